"""Each kernel behind a function that gives its result, or None where it refuses; then the naive twin is to run.

What a refusal can be is in `diffsynth.nn.kernels`. Kernels are imported on first use, because they import triton.
"""

from __future__ import annotations

from torch import Tensor

from diffsynth.nn.kernels import broadcasts, serves, too_wide, why_not


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str,
    eps: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | None:
    """See `diffsynth.nn.triton.norm`; `kind` is "none", "rms" or "layer"."""
    beside = (scale, shift, residual, gate)
    reason = why_not("norm", x, weight, bias, *beside) or broadcasts(x, *beside) or too_wide(x.shape[-1])
    if reason is None and residual is not None and residual.dtype != x.dtype:
        reason = f"the stream is {residual.dtype}, what is added to it {x.dtype}"
    if not serves("norm", reason):
        return None
    from diffsynth.nn.triton.norm import norm as kernel

    # Nothing is broadcast beside a plain norm, so that its rows may be counted in one go.
    rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    return kernel(rows, weight, bias, *beside, kind, eps).view(x.shape)


def norm_rotary(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, *, eps: float = 0.0) -> Tensor | None:
    """See `diffsynth.nn.triton.norm_rotary`."""
    reason = why_not("norm_rotary", x, weight, cos, sin) or too_wide(x.shape[2] * x.shape[3])
    if not serves("norm_rotary", reason):
        return None
    from diffsynth.nn.triton.norm_rotary import norm_rotary as kernel

    return kernel(x, weight, cos, sin, eps)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor | None:
    """See `diffsynth.nn.triton.gated_activation`."""
    reason = why_not("gated_activation", gate, up)
    if reason is None and (gate.shape != up.shape or gate.dtype != up.dtype):
        reason = f"gate is {tuple(gate.shape)} {gate.dtype}, up is {tuple(up.shape)} {up.dtype}"
    if not serves("gated_activation", reason):
        return None
    from diffsynth.nn.triton.gated_activation import gated_activation as kernel

    return kernel(gate, up, activation)


def sinusoidal_embedding(time: Tensor, dim: int, *, max_period: float) -> Tensor | None:
    """See `diffsynth.nn.triton.sinusoidal`."""
    if not serves("sinusoidal_embedding", why_not("sinusoidal_embedding", time)):
        return None
    from diffsynth.nn.triton.sinusoidal import sinusoidal_embedding as kernel

    return kernel(time, dim, max_period)
