"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), with operations that often follow it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.nn import fused, naive
from diffsynth.nn.rope import Rotary


def rms_norm(
    x: Float[Tensor, "*b d"],
    weight: Float[Tensor, "d"],
    *,
    eps: float,
    scale: Float[Tensor, "#b #s d"] | None = None,
    shift: Float[Tensor, "#b #s d"] | None = None,
    residual: Float[Tensor, "*b d"] | None = None,
    gate: Float[Tensor, "#b #s d"] | None = None,
) -> Float[Tensor, "*b d"]:
    """Return `y`, which is `x` after RMS norm over the last axis, then `y * (1 + scale) + shift` if `scale` is given,
    then `residual + gate * y` if `residual` is given, in the dtype of `x` (of `residual`, if given).

    `y = x / sqrt(mean(x**2) + eps) * weight`, then `y * (1 + scale) + shift`, then `residual + gate * y`, the last two
    if their tensors are given.

    Raises:
        ValueError: `shift` without `scale`, or one of `residual` and `gate` alone.
    """
    _check_pairs(scale, shift, residual, gate)
    out = fused.norm(x, weight, kind="rms", eps=eps, scale=scale, shift=shift, residual=residual, gate=gate)
    if out is not None:
        return out
    normed = naive.rms_norm(x, weight, eps=eps)
    if scale is not None:
        normed = naive.modulate(normed, scale, shift, overwrite=True)
    return normed if residual is None or gate is None else naive.gated_residual(residual, normed, gate, overwrite=True)


class RMSNorm(nn.Module):
    """Layer of `rms_norm` with a trained weight, initially ones."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self,
        x: Float[Tensor, "*b d"],
        *,
        scale: Float[Tensor, "#b #s d"] | None = None,
        shift: Float[Tensor, "#b #s d"] | None = None,
        residual: Float[Tensor, "*b d"] | None = None,
        gate: Float[Tensor, "#b #s d"] | None = None,
        rotary: Rotary | None = None,
    ) -> Float[Tensor, "*b d"]:
        """Return `x` after `rms_norm` with the layer's weight and these arguments, in the dtype of `x` (of `residual`,
        if given); with `rotary`, `x` (`b s n d`) after norm and rotation only.
        """
        if rotary is not None:
            return rms_norm_rotary(x, self.weight, *rotary, eps=self.eps)
        return rms_norm(x, self.weight, eps=self.eps, scale=scale, shift=shift, residual=residual, gate=gate)


def rms_norm_rotary(
    x: Float[Tensor, "b s n d"],
    weight: Float[Tensor, "width"],
    cos: Float[Tensor, "#b s half_d"],
    sin: Float[Tensor, "#b s half_d"],
    *,
    eps: float,
) -> Float[Tensor, "b s n d"]:
    """Return queries or keys `x` (`b s n d`) after RMS norm of each head (of all heads together if `weight` has `n * d`
    elements) and rotation by the angles of `cos` and `sin`, in the dtype of `x`.

    Args:
        x: queries or keys.
        weight: with `d` elements, each head is normalised separately (Z-Image, FLUX, Qwen-Image); with `n * d`, all
            heads of a token together (Wan).
        cos, sin: cosine and sine of the rotary angles, fp32.
        eps: added to the mean square.

    Raises:
        ValueError: `weight` has another length.
    """
    n, d = x.shape[2:]
    # Not `in (d, n * d)`: torch.compile of torch 2.11, with symbolic sizes, evaluates it to False for equal ones.
    if weight.shape[0] != d and weight.shape[0] != n * d:
        raise ValueError(f"weight has {weight.shape[0]} elements; expected {d} for each head or {n * d} for all")
    out = fused.norm_rotary(x, weight, cos, sin, eps=eps)
    return naive.rms_norm_rotary(x, weight, cos, sin, eps=eps) if out is None else out


def _check_pairs(scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, gate: Tensor | None) -> None:
    if shift is not None and scale is None:
        raise ValueError("shift is given without scale; modulation is x * (1 + scale) + shift")
    if (residual is None) != (gate is None):
        raise ValueError("residual and gate are given one without the other; the result is residual + gate * x")
