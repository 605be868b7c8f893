"""Image encoder of DINOv3 over transformers' layers."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

from diffsynth.models.image_config import Dinov3ImageEncoderConfig
from diffsynth.models.transformers_attention import attn_implementation


class Dinov3ImageEncoder(nn.Module):
    """Image encoder of DINOv3 (Siméoni et al. 2025, arXiv:2508.10104). Parameter names are those of the published file
    of DINOv3-7B; the embedding of masked patches, which only its pre-training uses, is left out.
    """

    def __init__(self, config: Dinov3ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        settings = DINOv3ViTConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.hidden_size // config.head_dim,
            intermediate_size=config.intermediate_size,
            hidden_act="silu",
            use_gated_mlp=True,
            query_bias=False,
            key_bias=False,
            value_bias=False,
            layer_norm_eps=config.norm_eps,
            attn_implementation=attn_implementation(),
        )
        self.embeddings = Dinov3Embeddings(config)
        self.layer = nn.ModuleList(DINOv3ViTLayer(settings) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Return the pooled output `b e`: the normalised hidden state of the class token after the last layer.

        Args:
            image: pixels, see `diffsynth.models.image_pixels.dinov3_pixels`; sides in multiples of the patch size.
        """
        rotary = self.rotary(image)
        hidden = self.embeddings(image)
        for layer in self.layer:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return self.norm(hidden)[:, 0]

    def rotary(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d"]]:
        """Return (cosines, sines) of the rotary embedding of the patches, each `s d` in the dtype of `image`, row by
        row; `d` is the dimension of a head.

        The positions of an axis are those of the centres of the patches between -1 and 1, whatever the image's size.
        """
        config = self.config
        axes = [(torch.arange(n, device=image.device) + 0.5) / n * 2 - 1 for n in self._grid(image)]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        steps = torch.arange(0, 1, 4 / config.head_dim, device=image.device)
        angles = 2 * math.pi * positions[:, :, None] / config.rope_theta**steps
        angles = repeat(angles, "s yx f -> s (half yx f)", half=2)
        return angles.cos().to(image.dtype), angles.sin().to(image.dtype)

    def _grid(self, image: Tensor) -> tuple[int, int]:
        return image.shape[2] // self.config.patch_size, image.shape[3] // self.config.patch_size


class Dinov3Embeddings(nn.Module):
    """Embeddings of the class token, the register tokens and the patches, in this order."""

    def __init__(self, config: Dinov3ImageEncoderConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.patch_embeddings = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b s e"]:
        """Return the tokens of the images, a tensor `b s e`."""
        patches = rearrange(self.patch_embeddings(image), "b e h w -> b (h w) e")
        first = torch.cat((self.cls_token, self.register_tokens), dim=1)
        return torch.cat((first.expand(len(patches), -1, -1), patches), dim=1)
