"""Image encoder of SigLIP and SigLIP 2 of one image size over transformers' layers."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipMultiheadAttentionPoolingHead

from diffsynth.models.image_config import SiglipImageEncoderConfig
from diffsynth.models.transformers_attention import attn_implementation


class SiglipImageEncoder(nn.Module):
    """Image encoder of SigLIP (Zhai et al. 2023, arXiv:2303.15343) and of SigLIP 2 at one image size (Tschannen et al.
    2025, arXiv:2502.14786). Parameter names are those of the published files of whole SigLIP models.
    """

    def __init__(self, config: SiglipImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        settings = SiglipVisionConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.hidden_size // config.head_dim,
            intermediate_size=config.intermediate_size,
            attention_dropout=0.0,
            attn_implementation=attn_implementation(),
        )
        self.vision_model = nn.Module()
        self.vision_model.embeddings = SiglipEmbeddings(config)
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(SiglipEncoderLayer(settings) for _ in range(config.num_layers))
        self.vision_model.post_layernorm = nn.LayerNorm(config.hidden_size, eps=settings.layer_norm_eps)
        self.vision_model.head = SiglipMultiheadAttentionPoolingHead(settings) if config.pooling_head else None

    def forward(
        self, image: Float[Tensor, "b 3 side side"], *, pooled: bool = False
    ) -> Float[Tensor, "b s e"] | Float[Tensor, "b e"]:
        """Return the normalised hidden states `b s e` of the last layer, one for each patch; with `pooled` the vector
        `b e` that the head makes of them.

        Args:
            image: pixels in [-1, 1] of the size in the config, see `diffsynth.models.image_pixels.siglip_pixels`.
            pooled: whether the head follows; only for a network with `config.pooling_head`.
        """
        hidden = self.vision_model.embeddings(image)
        for layer in self.vision_model.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        hidden = self.vision_model.post_layernorm(hidden)
        return self.vision_model.head(hidden) if pooled else hidden


class SiglipEmbeddings(nn.Module):
    """Embeddings of patches and of their positions."""

    def __init__(self, config: SiglipImageEncoderConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, image: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b s e"]:
        """Return the sum of both embeddings, a tensor `b s e`, row by row."""
        patches = rearrange(self.patch_embedding(image), "b e h w -> b (h w) e")
        return patches + self.position_embedding(torch.arange(patches.shape[1], device=image.device))
