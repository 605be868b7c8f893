"""Sizes of the two encoders, and how a file's shapes tell them. Light: no torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]

CLIP_HEAD_DIM = 80
"""Of ViT-H/14, and no shape tells it."""


@dataclass(frozen=True, kw_only=True)
class WanTextEncoderConfig:
    """The encoder of UMT5 (Chung et al. 2023, arXiv:2304.09151); the defaults are UMT5-XXL.

    Args:
        vocab_size: rows of the embedding.
        dim: width of the stream.
        dim_attn: of all heads together.
        dim_ffn: inner width of the gated feed-forward.
        num_heads: of attention.
        num_layers: blocks.
        num_buckets: of relative positions; half of them look back, half ahead.
        max_distance: from here on, in tokens, all positions share a bucket.
        norm_eps: of the RMS norms.
    """

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim_attn % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim_attn={self.dim_attn}")
        if self.num_buckets % 4:
            raise ValueError(f"num_buckets={self.num_buckets} must be a multiple of 4: near and far, back and ahead")


TINY_TEXT_ENCODER = WanTextEncoderConfig(
    vocab_size=120, dim=32, dim_attn=48, dim_ffn=56, num_heads=4, num_layers=2, num_buckets=8
)


def tiny_text_encoder_inputs(config: WanTextEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `WanTextEncoder.forward`: two prompts of different length; on the CPU."""
    import torch

    return {
        "input_ids": torch.randint(config.vocab_size, (2, 11), generator=generator),
        "attention_mask": (torch.arange(11)[None, :] < torch.tensor([[11], [6]])).long(),
    }


def infer_text_encoder_config(shapes: Shapes) -> WanTextEncoderConfig:
    """The config of a file, from its shapes under our own names."""
    vocab_size, dim = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return WanTextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=shapes["blocks.0.attn.q.weight"][0],
        dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=num_heads,
        num_layers=_count(shapes, "blocks"),
        num_buckets=num_buckets,
    )


@dataclass(frozen=True, kw_only=True)
class WanImageEncoderConfig:
    """A CLIP vision tower as deep as Wan reads it; the defaults are open_clip's XLM-RoBERTa ViT-H/14.

    Args:
        image_size: side of the square image, in pixels.
        patch_size: side of a token, in pixels.
        dim: width of the stream.
        dim_mlp: inner width of the feed-forward.
        num_heads: of attention.
        num_layers: blocks: one less than the published tower has.
        norm_eps: of the layer norms.
    """

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    dim_mlp: int = 5120
    num_heads: int = 16
    num_layers: int = 31
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={self.dim}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")

    @property
    def num_tokens(self) -> int:
        """The class token, and one for each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


TINY_IMAGE_ENCODER = WanImageEncoderConfig(image_size=56, dim=160, dim_mlp=96, num_heads=2, num_layers=2)


def tiny_image_encoder_inputs(config: WanImageEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `WanImageEncoder.forward`: two small images that are not square; fp32 on the CPU."""
    import torch

    return {"image": torch.rand(2, 3, 40, 72, generator=generator) * 2 - 1}


def infer_image_encoder_config(shapes: Shapes) -> WanImageEncoderConfig:
    """The config of a file, from its shapes under our own names.

    Raises:
        ValueError: the tokens are no square of patches, or the width is no multiple of ViT-H's head dimension.
    """
    dim, _, patch_size, _ = shapes["patch_embedding.weight"]
    num_tokens = shapes["pos_embedding"][1]
    side = round((num_tokens - 1) ** 0.5)
    if side * side != num_tokens - 1:
        raise ValueError(f"{num_tokens} positions: expected a class token and a square of patches")
    if dim % CLIP_HEAD_DIM:
        raise ValueError(f"width {dim}: expected a multiple of {CLIP_HEAD_DIM}, the head dimension of ViT-H/14")
    return WanImageEncoderConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        dim=dim,
        dim_mlp=shapes["transformer.0.mlp.0.weight"][0],
        num_heads=dim // CLIP_HEAD_DIM,
        num_layers=_count(shapes, "transformer"),
    )


def _count(shapes: Shapes, name: str) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})
