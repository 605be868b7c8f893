"""CLIP's vision tower (Radford et al. 2021, arXiv:2103.00020) up to the layer that Wan's image branch uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth_wan.config import WanImageEncoderConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation per colour channel of CLIP's training images, in [0, 1]."""


class WanImageEncoder(nn.Module):
    """Image encoder of open_clip's XLM-RoBERTa ViT-H/14 that returns the penultimate hidden states.

    Parameter names are those of the published `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` without
    `visual.`. The last block, the final norm and the projection are left out: Wan does not use them.
    """

    def __init__(self, config: WanImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.transformer = nn.ModuleList(ClipBlock(config) for _ in range(config.num_layers))

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b s e"]:
        """Return the hidden states `b s e` of the class token and of each patch, in the dtype of `image`.

        Args:
            image: pixels in [-1, 1] of any size; resized to a square of `config.image_size` without keeping the aspect
                ratio, as in training.
        """
        patches = self.patch_embedding(clip_pixels(image, self.config.image_size))
        patches = rearrange(patches, "b e h w -> b (h w) e")
        x = torch.cat([self.cls_embedding.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embedding
        x = self.pre_norm(x)
        for block in self.transformer:
            x = block(x)
        return x


def clip_pixels(image: Float[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 size size"]:
    """Return CLIP's input `b 3 size size`: pixels in [-1, 1] resized to a square and normalised by `MEAN` and `STD`."""
    # Interpolating in bf16 would round every pixel twice.
    pixels = F.interpolate(image.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(each, device=image.device)[:, None, None] for each in (MEAN, STD))
    return ((pixels * 0.5 + 0.5 - mean) / std).to(image.dtype)


class ClipBlock(nn.Module):
    """Pre-norm transformer block: self-attention and feed-forward."""

    def __init__(self, config: WanImageEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = ClipAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.dim_mlp), nn.GELU(), nn.Linear(config.dim_mlp, config.dim)
        )

    def forward(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the hidden states `b s e` after this block."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClipAttention(nn.Module):
    """Self-attention without a mask."""

    def __init__(self, config: WanImageEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the projected attention output `b s e`, one vector for each token."""
        q, k, v = rearrange(self.to_qkv(x), "b s (three n d) -> three b s n d", three=3, n=self.num_heads)
        return self.proj(rearrange(attention(q, k, v), "b s n d -> b s (n d)"))
