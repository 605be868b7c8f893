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

_LARGE = 2**16
"""Number of elements from which memory is used again."""


def rms_norm(x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"], *, eps: float) -> Float[Tensor, "*b d"]:
    """Return the tensor `x / sqrt(mean(x**2) + eps) * weight`, the mean over the last axis, in the dtype of `x`."""
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    # Under autocast activations are bf16 and weights fp32: PyTorch's fused kernel takes only equal dtypes.
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"] | None, bias: Float[Tensor, "d"] | None, *, eps: float
) -> Float[Tensor, "*b d"]:
    """Return the tensor `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis, in the dtype of `x`; a
    `weight` or `bias` of None is skipped.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def modulate(x: Tensor, scale: Tensor, shift: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
    """Return the tensor `x * (1 + scale) + shift`, in the dtype of `x`; nothing is added if `shift` is None. With
    `overwrite` the memory of `x` may be used for it.
    """
    factor = 1 + scale
    modulated = x.mul_(factor) if overwrite and _fits(x, factor) else x * factor
    if shift is not None:
        modulated = modulated.add_(shift) if _fits(modulated, shift) else modulated + shift
    return modulated.to(x.dtype)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor, *, overwrite: bool = False) -> Tensor:
    """Return the tensor `x + gate * h`, in the dtype of `x`. With `overwrite` the memory of `h` may be used for it."""
    gated = h.mul_(gate) if overwrite and _fits(h, gate) else gate * h
    return (gated.add_(x) if _fits(gated, x) else x + gated).to(x.dtype)


def _fits(x: Tensor, other: Tensor) -> bool:
    """Whether an operation of `x` and `other` may overwrite `x`: no gradient is recorded, and the result has the shape
    and dtype of `x`. It pays for large tensors, whose new memory takes longer to write to than old.
    """
    if x.numel() < _LARGE or torch.is_grad_enabled() or other.dtype != x.dtype or other.ndim > x.ndim:
        return False
    return all(size in (1, whole) for size, whole in zip(reversed(other.shape), reversed(x.shape), strict=False))


def apply_rotary(
    x: Float[Tensor, "b s n d"],
    cos: Float[Tensor, "#b s half_d"],
    sin: Float[Tensor, "#b s half_d"],
    *,
    overwrite: bool = False,
) -> Float[Tensor, "b s n d"]:
    """Return `x` (`b s n d`) with channels `(2i, 2i + 1)` rotated as a complex number by the angle of `cos` and `sin`,
    in the dtype of `x`; computed in fp32 (fp64 for fp64). With `overwrite` the memory of `x` may be used for it.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # On the CPU one product of complex numbers takes an eighth of the time; the compiler has no complex numbers.
        numbers = torch.view_as_complex(precise.unflatten(-1, (-1, 2)).contiguous())
        angles = _complex(cos, sin)[:, :, None]
        is_own = overwrite or precise is not x
        rotated = numbers.mul_(angles) if is_own and _fits(numbers, angles) else numbers * angles
        return torch.view_as_real(rotated).flatten(-2).to(x.dtype)
    even, odd = rearrange(precise, "b s n (half two) -> two b s n half", two=2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _complex(cos: Float[Tensor, "#b s half_d"], sin: Float[Tensor, "#b s half_d"]) -> Tensor:
    """Return the complex tensor `cos + i sin`; without a copy if they are its parts, as `rotary_table` returns them."""
    strides = cos.stride()
    if strides[-1] != 2 or sin.stride() != strides or sin.data_ptr() != cos.data_ptr() + cos.element_size():
        return torch.complex(cos, sin)
    return torch.view_as_complex(cos.as_strided((*cos.shape, 2), (*strides, 1)))


def rms_norm_rotary(
    x: Float[Tensor, "b s n d"],
    weight: Float[Tensor, "width"],
    cos: Float[Tensor, "#b s half_d"],
    sin: Float[Tensor, "#b s half_d"],
    *,
    eps: float,
) -> Float[Tensor, "b s n d"]:
    """Return `x` (`b s n d`) after `rms_norm` over `d` (over `n * d` if `weight` is longer than `d`) and
    `apply_rotary`, in the dtype of `x`.
    """
    n, d = x.shape[2:]
    if weight.shape[0] == d:
        return apply_rotary(rms_norm(x, weight, eps=eps), cos, sin, overwrite=True)
    return apply_rotary(rms_norm(x.flatten(2), weight, eps=eps).unflatten(2, (n, d)), cos, sin, overwrite=True)


def swiglu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Return the tensor `silu(gate) * up`, of the shape of `up`."""
    activated = F.silu(gate)
    return activated.mul_(up) if _fits(activated, up) else activated * up


def geglu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Return the tensor `gelu(gate) * up`, of the shape of `up`, with the tanh approximation of gelu."""
    activated = F.gelu(gate, approximate="tanh")
    return activated.mul_(up) if _fits(activated, up) else activated * up


def sinusoidal_embedding(time: Float[Tensor, "b"], dim: int, *, max_period: float) -> Float[Tensor, "b dim"]:
    """Return an fp32 tensor `b dim`: the cosines, then the sines, of `time` (`b`) at `dim / 2` frequencies from 1 down
    to about 1 / max_period.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=time.device) / (dim // 2)
    angles = time[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
