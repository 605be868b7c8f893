"""The reference implementations of the fused layers in plain torch, which also run if no kernel can.

The kernels are tested against them. Each function works on any device and dtype and has gradients. Results have the
dtype of the first argument.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def rms_norm(x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"], *, eps: float) -> Float[Tensor, "*b d"]:
    """Return `x / sqrt(mean(x**2) + eps) * weight` over the last axis, in the dtype of `x`."""
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    # Under autocast activations are bf16 and weights fp32: PyTorch's fused kernel takes only equal dtypes.
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"] | None, bias: Float[Tensor, "d"] | None, *, eps: float
) -> Float[Tensor, "*b d"]:
    """Return `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis, in the dtype of `x`."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def modulate(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return `x * (1 + scale) + shift`, in the dtype of `x`; `shift` may be None."""
    modulated = x * (1 + scale)
    return (modulated if shift is None else modulated + shift).to(x.dtype)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """Return `x + gate * h`, in the dtype of `x`."""
    return (x + gate * h).to(x.dtype)


def apply_rotary(
    x: Float[Tensor, "b s n d"], cos: Float[Tensor, "#b s half_d"], sin: Float[Tensor, "#b s half_d"]
) -> Float[Tensor, "b s n d"]:
    """Return `x` with channels `(2i, 2i + 1)` rotated as complex numbers; computed in fp32 (fp64 for fp64)."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = rearrange(precise, "b s n (half two) -> two b s n half", two=2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rms_norm_rotary(
    x: Float[Tensor, "b s n d"],
    weight: Float[Tensor, "width"],
    cos: Float[Tensor, "#b s half_d"],
    sin: Float[Tensor, "#b s half_d"],
    *,
    eps: float,
) -> Float[Tensor, "b s n d"]:
    """Return `x` after `rms_norm` over `d`, or over `n * d` if `weight` has as many elements, and `apply_rotary`."""
    n, d = x.shape[2:]
    if weight.shape[0] == d:
        return apply_rotary(rms_norm(x, weight, eps=eps), cos, sin)
    return apply_rotary(rms_norm(x.flatten(2), weight, eps=eps).unflatten(2, (n, d)), cos, sin)


def swiglu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Return `silu(gate) * up`."""
    return F.silu(gate) * up


def geglu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Return `gelu(gate) * up`, with the tanh approximation of gelu."""
    return F.gelu(gate, approximate="tanh") * up


def sinusoidal_embedding(time: Float[Tensor, "b"], dim: int, *, max_period: float) -> Float[Tensor, "b dim"]:
    """Return cosines, then sines, of `time` at `dim / 2` frequencies from 1 down to 1 / max_period; fp32."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=time.device) / (dim // 2)
    angles = time[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
