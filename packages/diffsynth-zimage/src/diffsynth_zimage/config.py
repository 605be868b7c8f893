"""Config of the Z-Image transformer, and a function that infers it from the shapes in a file. Light: no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.core.loader.shapes import Shapes, count_items

if TYPE_CHECKING:
    import torch

VAE_FACTOR = 8
MAX_PROMPT_TOKENS = 512

TOKEN_MULTIPLE = 32
"""Image and caption are each padded to a multiple of this number of tokens, with learned tokens that take part."""


@dataclass(frozen=True, kw_only=True)
class ZImageDiTConfig:
    """Config of Z-Image's single-stream transformer; the defaults are Z-Image and Z-Image-Turbo.

    Args:
        dim: width of the tokens.
        n_layers: number of layers over image and caption together.
        n_refiner_layers: number of layers over the image alone, and over the caption alone, before the joint layers.
        n_heads: number of query heads; `dim / n_heads` is the head dimension.
        n_kv_heads: number of key and value heads.
        norm_eps: epsilon of the RMS norms of attention, feed-forward and caption.
        qk_norm: whether queries and keys are RMS-normalised.
        cap_feat_dim: width of the text encoder's hidden states.
        in_channels: latent channels.
        patch_size: side of a token in latent pixels.
        axes_dims: channels of a head that RoPE rotates by time, height and width; their sum is the head dimension.
        axes_lens: number of positions per axis in training; not a limit.
        rope_theta: base of the rotary frequencies.
        t_scale: factor from the time in [0, 1] that forward() takes to the network's timestep.
        time_hidden_dim: inner width of the time MLP.
    """

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    in_channels: int = 16
    patch_size: int = 2
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1024, 512, 512)
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    time_hidden_dim: int = 1024

    def __post_init__(self) -> None:
        # Metadata is JSON: it gives lists where a hashable config needs tuples.
        object.__setattr__(self, "axes_dims", tuple(self.axes_dims))
        object.__setattr__(self, "axes_lens", tuple(self.axes_lens))
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must divide dim={self.dim} and be a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(f"axes_dims={self.axes_dims} must be even and sum to dim / n_heads = {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Number of channels of each attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Inner width of the gated feed-forward, in channels."""
        return int(self.dim / 3 * 8)

    @property
    def time_dim(self) -> int:
        """Width, in channels, of the time embedding that modulates the layers."""
        return min(self.dim, 256)


TINY_DIT = ZImageDiTConfig(
    dim=64,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=4,
    n_kv_heads=4,
    cap_feat_dim=32,
    axes_dims=(4, 6, 6),
    time_hidden_dim=48,
)


def tiny_dit_inputs(config: ZImageDiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `ZImageDiT.forward`: two images, captions of two lengths; fp32 on the CPU."""
    import torch

    mask = torch.arange(9)[None, :] < torch.tensor([[9], [5]])
    return {
        "latents": torch.randn(2, config.in_channels, 6, 10, generator=generator),
        "time": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 9, config.cap_feat_dim, generator=generator),
        "prompt_mask": mask,
    }


def infer_dit_config(shapes: Shapes) -> ZImageDiTConfig:
    """Return the `ZImageDiTConfig` of a transformer file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the file is of another variant, or has sizes that no Z-Image network has.
    """
    if any(name.startswith("siglip_") for name in shapes):
        raise ValueError("it has siglip_* parameters: that is the Omni variant")
    patch_size = _patch_size(shapes)
    embedder = f"all_x_embedder.{patch_size}-1.weight"
    dim, patch_dim = shapes[embedder]
    if "layers.0.attention.norm_q.weight" not in shapes:
        raise ValueError(
            "layers.0.attention.norm_q.weight is missing; the head dimension cannot be inferred without it"
        )
    (head_dim,) = shapes["layers.0.attention.norm_q.weight"]
    if head_dim % 16 or dim % head_dim:
        raise ValueError(f"head dimension {head_dim}: expected a multiple of 16 that divides the width {dim}")
    config = ZImageDiTConfig(
        dim=dim,
        n_layers=count_items(shapes, "layers"),
        n_refiner_layers=count_items(shapes, "noise_refiner"),
        n_heads=dim // head_dim,
        n_kv_heads=shapes["layers.0.attention.to_k.weight"][0] // head_dim,
        cap_feat_dim=shapes["cap_embedder.1.weight"][1],
        in_channels=patch_dim // patch_size**2,
        patch_size=patch_size,
        # RoPE uses a quarter of each head for time and the rest in equal parts for height and width.
        axes_dims=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
        time_hidden_dim=shapes["t_embedder.mlp.0.weight"][0],
    )
    ffn_dim = shapes["layers.0.feed_forward.w1.weight"][0]
    if ffn_dim != config.ffn_dim:
        raise ValueError(f"feed-forward width {ffn_dim}: expected 8/3 of {dim}, {config.ffn_dim}")
    return config


def _patch_size(shapes: Shapes) -> int:
    found = [match for name in shapes if (match := re.fullmatch(r"all_x_embedder\.(\d+)-(\d+)\.weight", name))]
    if len(found) != 1 or found[0][2] != "1":
        raise ValueError(f"{len(found)} patch embedders (all_x_embedder.P-1.weight); expected one, of a single frame")
    return int(found[0][1])
