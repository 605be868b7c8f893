"""Image encoder of SigLIP 2 for images of any shape over transformers' layers, for Z-Image-Omni-Base."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Siglip2VisionConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer

from diffsynth.models.transformers_attention import attn_implementation
from diffsynth_zimage.config import Siglip2ImageEncoderConfig


class Siglip2ImageEncoder(nn.Module):
    """Image encoder of SigLIP 2 (Tschannen et al. 2025, arXiv:2502.14786) for images of any shape, without its pooling
    head. Parameter names are those of the published `siglip/model.safetensors` of Z-Image-Omni-Base.
    """

    def __init__(self, config: Siglip2ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        settings = Siglip2VisionConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            attention_dropout=0.0,
            attn_implementation=attn_implementation(),
        )
        self.vision_model = nn.Module()
        self.vision_model.embeddings = Siglip2Embeddings(config)
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(
            Siglip2EncoderLayer(settings) for _ in range(config.num_layers)
        )
        self.vision_model.post_layernorm = nn.LayerNorm(config.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, patches: Float[Tensor, "b rows columns values"]) -> Float[Tensor, "b rows columns e"]:
        """Return the normalised hidden states `b rows columns e` of the last layer, one for each patch.

        Args:
            patches: pixels in [-1, 1] of each patch, see `diffsynth_zimage.image_patches.siglip2_patches`.
        """
        rows = patches.shape[1]
        hidden = self.vision_model.embeddings(patches)
        for layer in self.vision_model.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        return rearrange(self.vision_model.post_layernorm(hidden), "b (h w) e -> b h w e", h=rows)


class Siglip2Embeddings(nn.Module):
    """Embeddings of patches and of their positions, which are resized to the grid of the image."""

    def __init__(self, config: Siglip2ImageEncoderConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, patches: Float[Tensor, "b rows columns values"]) -> Float[Tensor, "b s e"]:
        """Return the sum of both embeddings, a tensor `b s e`, row by row."""
        grid, count = patches.shape[1:3], self.position_embedding.num_embeddings
        # The embedding is called, so that its weight is there when it is streamed.
        trained = self.position_embedding(torch.arange(count, device=patches.device))
        trained = rearrange(trained, "(h w) e -> 1 e h w", h=math.isqrt(count))
        # In fp32, because PyTorch has no antialiasing in bf16 on the CPU.
        positions = F.interpolate(trained.float(), size=grid, mode="bilinear", antialias=True).to(trained.dtype)
        return rearrange(self.patch_embedding(patches), "b h w e -> b (h w) e") + rearrange(
            positions, "1 e h w -> 1 (h w) e"
        )
