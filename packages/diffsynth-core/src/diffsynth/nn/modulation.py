"""Adaptive modulation of hidden states by the diffusion time (DiT, Peebles & Xie 2022, arXiv:2212.09748)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffsynth.nn import fused, naive


def modulate(
    x: Float[Tensor, "b s e"], scale: Float[Tensor, "#b #s e"], shift: Float[Tensor, "#b #s e"] | None = None
) -> Float[Tensor, "b s e"]:
    """Return the tensor `x * (1 + scale) + shift`, in the shape and dtype of `x`; nothing is added if `shift` is None.

    After a norm, pass `scale` and `shift` to the norm instead, which is one kernel.
    """
    out = fused.norm(x, kind="none", scale=scale, shift=shift)
    return naive.modulate(x, scale, shift) if out is None else out


def gated_residual(
    x: Float[Tensor, "b s e"], h: Float[Tensor, "b s e"], gate: Float[Tensor, "#b #s e"]
) -> Float[Tensor, "b s e"]:
    """Return the tensor `x + gate * h`, a gated residual connection, in the shape and dtype of `x`."""
    out = fused.norm(h, kind="none", residual=x, gate=gate)
    return naive.gated_residual(x, h, gate) if out is None else out
