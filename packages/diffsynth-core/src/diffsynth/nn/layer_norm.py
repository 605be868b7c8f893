"""Layer normalisation (Ba et al. 2016, arXiv:1607.06450), with optional modulation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.nn import fused, naive


def layer_norm(
    x: Float[Tensor, "*b d"],
    weight: Float[Tensor, "d"] | None = None,
    bias: Float[Tensor, "d"] | None = None,
    *,
    eps: float,
    scale: Float[Tensor, "#b #s d"] | None = None,
    shift: Float[Tensor, "#b #s d"] | None = None,
) -> Float[Tensor, "*b d"]:
    """Return `x` after layer norm over the last axis and, if `scale` is given, modulation `* (1 + scale) + shift`, in
    the dtype of `x`.

    `y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, then `y * (1 + scale) + shift` if they are given.

    Raises:
        ValueError: `shift` without `scale`.
    """
    if shift is not None and scale is None:
        raise ValueError("shift is given without scale; modulation is x * (1 + scale) + shift")
    out = fused.norm(x, weight, bias, kind="layer", eps=eps, scale=scale, shift=shift)
    if out is not None:
        return out
    normed = naive.layer_norm(x, weight, bias, eps=eps)
    return normed if scale is None else naive.modulate(normed, scale, shift, overwrite=True)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, with optional modulation: `norm(x, scale=scale, shift=shift)`."""

    def forward(
        self,
        x: Float[Tensor, "*b d"],
        *,
        scale: Float[Tensor, "#b #s d"] | None = None,
        shift: Float[Tensor, "#b #s d"] | None = None,
    ) -> Float[Tensor, "*b d"]:
        """Return `x` after layer norm over the last axis and, if `scale` is given, modulation `* (1 + scale) + shift`,
        in the dtype of `x`.
        """
        return layer_norm(x, self.weight, self.bias, eps=self.eps, scale=scale, shift=shift)
