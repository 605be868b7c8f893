"""Config of the Qwen-Image transformer, and the function that infers it from the shapes in a file.

Light: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.core.loader.shapes import Shapes, count_items

if TYPE_CHECKING:
    import torch

VAE_FACTOR = 8
"""Number of image pixels per side of a latent pixel."""

TOKEN_FACTOR = 16
"""Number of image pixels per side of a token of the transformer."""


@dataclass(frozen=True, kw_only=True)
class QwenImageDiTConfig:
    """Config of Qwen-Image's transformer (arXiv:2508.02324); the defaults are Qwen-Image and its edit models.

    Args:
        dim: width of the tokens.
        n_heads: number of attention heads; `dim / n_heads` is the head dimension.
        n_layers: number of blocks.
        in_channels: latent channels.
        patch_size: side of a token in latent pixels.
        prompt_dim: width of the text encoder's hidden states.
        ffn_dim: inner width of the feed-forwards.
        frequency_dim: number of sinusoids that embed the noise level.
        axes_dims: channels of a head that RoPE rotates by image, row and column; their sum is the head dimension.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of all norms.
        layered: whether the network is Qwen-Image-Layered: it computes several layers of one image, and its time
            embedding has one more term, which says whether the image is opaque.

    Raises:
        ValueError: heads that do not divide the width, or axes that do not fill a head.
    """

    dim: int = 3072
    n_heads: int = 24
    n_layers: int = 60
    in_channels: int = 16
    patch_size: int = 2
    prompt_dim: int = 3584
    ffn_dim: int = 12288
    frequency_dim: int = 256
    axes_dims: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    layered: bool = False

    def __post_init__(self) -> None:
        # Metadata is JSON: it gives lists where a hashable config needs tuples.
        object.__setattr__(self, "axes_dims", tuple(self.axes_dims))
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide dim={self.dim}")
        if sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(f"axes_dims={self.axes_dims} must be even and sum to dim / n_heads = {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Number of channels of each attention head."""
        return self.dim // self.n_heads

    @property
    def patch_dim(self) -> int:
        """Number of latent values of a token."""
        return self.in_channels * self.patch_size**2


TINY_DIT = QwenImageDiTConfig(dim=64, n_heads=2, n_layers=2, prompt_dim=48, ffn_dim=256, axes_dims=(4, 14, 14))


def tiny_dit_inputs(config: QwenImageDiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `QwenImageDiT.forward`: two images of 3 x 5 tokens, with prompts of two lengths;
    fp32 on the CPU.
    """
    import torch

    return {
        "latents": torch.randn(2, config.in_channels, 6, 10, generator=generator),
        "sigma": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 7, config.prompt_dim, generator=generator),
        "prompt_mask": torch.arange(7)[None, :] < torch.tensor([[7], [4]]),
    }


def infer_dit_config(shapes: Shapes) -> QwenImageDiTConfig:
    """Return the `QwenImageDiTConfig` of a transformer file, inferred from the shapes of its tensors.

    Raises:
        ValueError: sizes that no network of Qwen-Image has.
    """
    values, (outputs, _) = shapes["img_in.weight"][1], shapes["proj_out.weight"]
    if outputs != values:
        raise ValueError(f"patches of {values} values at the input and {outputs} at the output: expected one number")
    return QwenImageDiTConfig(**infer_blocks(shapes), layered="time_text_embed.addition_t_embedding.weight" in shapes)


def infer_blocks(shapes: Shapes) -> dict[str, Any]:
    """Return a dict field of `QwenImageDiTConfig` -> value, of those that the shapes of the embedders and blocks in a
    file determine.

    Raises:
        ValueError: sizes that no network of Qwen-Image has.
    """
    dim, patch_dim = shapes["img_in.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    if head_dim % 32 or dim % head_dim:
        raise ValueError(f"head dimension {head_dim}: expected a multiple of 32 that divides the width {dim}")
    patch = QwenImageDiTConfig.patch_size
    if patch_dim % patch**2:
        raise ValueError(f"patches of {patch_dim} values: expected a multiple of the {patch**2} pixels of a patch")
    return {
        "dim": dim,
        "n_heads": dim // head_dim,
        "n_layers": count_items(shapes, "transformer_blocks"),
        "in_channels": patch_dim // patch**2,
        "prompt_dim": shapes["txt_in.weight"][1],
        "ffn_dim": shapes["transformer_blocks.0.img_mlp.net.2.weight"][1],
        "frequency_dim": shapes["time_text_embed.timestep_embedder.linear_1.weight"][1],
        # RoPE uses an eighth of each head for the image and the rest in equal parts for rows and columns.
        "axes_dims": (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
    }
