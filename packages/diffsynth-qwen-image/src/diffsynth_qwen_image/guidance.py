"""Classifier-free guidance that keeps the size of the network's prediction, as in diffusers' Qwen-Image pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.guidance import Guidance, GuidanceStep
from diffsynth.sampling.guidance import classifier_free_guidance
from diffsynth_qwen_image.config import QwenImageDiTConfig


@dataclass(frozen=True, kw_only=True)
class TokenNorm(Guidance):
    """Classifier-free guidance with each token's velocity scaled to the L2 norm of that of the `cond` branch.

    See `token_norm_guidance`.
    """

    def combine(self, predictions: Mapping[str, Tensor], cfg_scale: float, step: GuidanceStep) -> Tensor:
        """Return the guided velocity; see `Guidance.combine`."""
        return token_norm_guidance(predictions["cond"], predictions["uncond"], cfg_scale)


def token_norm_guidance(
    velocity_cond: Float[Tensor, "b c *t h w"], velocity_uncond: Float[Tensor, "b c *t h w"], cfg_scale: float
) -> Float[Tensor, "b c *t h w"]:
    """Return the velocity of classifier-free guidance with each token scaled to the L2 norm that it has in
    `velocity_cond`, a tensor in the shape and dtype of the inputs.

    A token is a square of 2 x 2 latent pixels. Large scales then do not make the velocity, and with it the contrast,
    larger than the network's own.

    Args:
        velocity_cond: velocity of the prompt; height and width are even.
        velocity_uncond: velocity without it, or of a negative prompt.
        cfg_scale: as for `diffsynth.sampling.guidance.classifier_free_guidance`.

    Raises:
        ValueError: the two shapes differ.
    """
    guided = classifier_free_guidance(velocity_cond, velocity_uncond, cfg_scale)
    smallest = torch.finfo(guided.dtype).tiny
    scale = _norms(velocity_cond) / _norms(guided).clamp_min(smallest)
    patch = QwenImageDiTConfig.patch_size
    return guided * scale.repeat_interleave(patch, dim=-2).repeat_interleave(patch, dim=-1)


def _norms(velocity: Tensor) -> Tensor:
    """Return the L2 norm of each token over channels and pixels, `b 1 *t rows columns`."""
    patch = QwenImageDiTConfig.patch_size
    squares = rearrange(velocity.square(), "... (h p) (w q) -> ... h w (p q)", p=patch, q=patch).sum(-1)
    return squares.sum(dim=1, keepdim=True).sqrt()
