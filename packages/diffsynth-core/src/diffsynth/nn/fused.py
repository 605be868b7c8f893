"""The fused kernels behind functions that return None if a kernel cannot serve a call, and the reasons.

Whether a kernel serves a call depends on the call alone: its devices, dtypes, shapes, and whether a gradient is needed.
Nothing is timed, and nothing is probed at import. If a kernel refuses, the reference implementation in
`diffsynth.nn.naive` runs, and the reason is logged once, at debug level; `why_not` returns it. Kernels are imported at
first use, because they import Triton.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from diffsynth import _env
from diffsynth.errors import did_you_mean
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

KERNELS = ("gated_activation", "norm", "norm_rotary", "sinusoidal_embedding")
"""`norm` also serves `modulate` and `gated_residual`; `norm_rotary` also serves RoPE without a norm."""

MAX_WIDTH = 16384
"""Most elements that a program holds in registers: a row in `norm`, all heads of a token in `norm_rotary`."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_logged: set[tuple[str, str]] = set()
"""(kernel, reason) of the refusals that were logged."""


def why_not(kernel: str, *tensors: Tensor | None) -> str | None:
    """Return a text, the reason why the fused kernel `kernel` cannot serve a call with these tensors, or None if it
    can.

    Args:
        kernel: one of `KERNELS`.
        tensors: inputs of the call, first the one with the shape of the result; None for omitted ones.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown{did_you_mean(kernel, KERNELS)}; expected one of {KERNELS}")
    given = [tensor for tensor in tensors if tensor is not None]
    first = given[0]
    reason = no_kernels_on(first.device.type)
    if reason is not None:
        return reason
    for tensor in given:
        if tensor.device != first.device:
            return f"tensors are on {first.device} and on {tensor.device}"
        if tensor.dtype not in _DTYPES:
            return f"dtype {tensor.dtype} is none of fp32, bf16, fp16"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "a gradient is needed, and the kernel has no backward pass"
    if first.numel() == 0:
        return f"a tensor of shape {tuple(first.shape)} is empty"
    return None


def no_kernels_on(device_type: str) -> str | None:
    """Return a text, the reason why no fused kernel runs on this kind of device ("cuda"), or None if they do."""
    if not _env.fused_kernels():
        return "DIFFSYNTH_FUSED_KERNELS is off"
    if device_type != "cuda":
        return f"tensors are on {device_type}; the kernels run on cuda"
    return None if _triton_is_installed() else "triton is not installed"


# The attribute that torch.compiler.assume_constant_result() sets; calling it would import the compiler.
no_kernels_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(kernel: str, reason: str | None) -> bool:
    """Whether `reason` is None, so that the kernel serves the call; another reason is logged the first time that it
    occurs, except while torch.compile traces.
    """
    if reason is not None and not torch.compiler.is_compiling() and (kernel, reason) not in _logged:
        _logged.add((kernel, reason))
        logger.debug("%s runs as plain torch: %s", kernel, reason)
    return reason is None


def broadcasts(x: Tensor, *others: Tensor | None) -> str | None:
    """Return a text why one of `others` (None, or `#b #s e`) does not broadcast to `x` (`b s e`), or None if all do."""
    for other in others:
        if other is None:
            continue
        if x.ndim != 3 or other.ndim != 3 or other.shape[2] != x.shape[2]:
            return f"shapes are {tuple(x.shape)} and {tuple(other.shape)}; the kernel takes 'b s e' and '#b #s e'"
        if other.shape[0] not in (1, x.shape[0]) or other.shape[1] not in (1, x.shape[1]):
            return f"shape {tuple(other.shape)} does not broadcast to {tuple(x.shape)}"
    return None


def too_wide(width: int) -> str | None:
    """Return a text why a kernel program cannot hold `width` elements, if there are more than 16384; else None."""
    return (
        f"{width} elements are normalised together; the kernel takes at most {MAX_WIDTH}" if width > MAX_WIDTH else None
    )


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


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
    """Return `x` after the norm `kind` ("none", "rms" or "layer"), modulation, multiplication by `gate` and addition to
    `residual` (steps whose tensors are None are skipped), of the shape of `x`; None if the fused kernel cannot serve
    the call.
    """
    broadcast = (scale, shift, residual, gate)
    reason = why_not("norm", x, weight, bias, *broadcast) or broadcasts(x, *broadcast) or too_wide(x.shape[-1])
    if reason is None and residual is not None and residual.dtype != x.dtype:
        reason = f"residual is {residual.dtype}, and x is {x.dtype}"
    if not serves("norm", reason):
        return None
    from diffsynth.nn.triton.norm import norm as kernel

    # A norm without broadcast tensors may treat all rows as one batch.
    rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    return kernel(rows, weight, bias, *broadcast, kind, eps).view(x.shape)


def norm_rotary(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, *, eps: float = 0.0) -> Tensor | None:
    """Return `x` after RMS norm (unless `weight` is None) and rotation by `cos` and `sin`, of the shape of `x`; None if
    the fused kernel cannot serve the call.
    """
    reason = why_not("norm_rotary", x, weight, cos, sin) or too_wide(x.shape[2] * x.shape[3])
    if not serves("norm_rotary", reason):
        return None
    from diffsynth.nn.triton.norm_rotary import norm_rotary as kernel

    return kernel(x, weight, cos, sin, eps)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor | None:
    """Return the tensor `activation(gate) * up`, with activation "silu" or "gelu" (tanh approximation); None if the
    fused kernel cannot serve the call.
    """
    reason = why_not("gated_activation", gate, up)
    if reason is None and (gate.shape != up.shape or gate.dtype != up.dtype):
        reason = f"gate is {tuple(gate.shape)} {gate.dtype}, up is {tuple(up.shape)} {up.dtype}"
    if not serves("gated_activation", reason):
        return None
    from diffsynth.nn.triton.gated_activation import gated_activation as kernel

    return kernel(gate, up, activation)


def sinusoidal_embedding(time: Tensor, dim: int, *, max_period: float) -> Tensor | None:
    """Return an fp32 tensor `b dim`: the cosines, then the sines, of `time` (`b`) at `dim / 2` frequencies from 1 down
    to about 1 / max_period; None if the fused kernel cannot serve the call.
    """
    if not serves("sinusoidal_embedding", why_not("sinusoidal_embedding", time)):
        return None
    from diffsynth.nn.triton.sinusoidal import sinusoidal_embedding as kernel

    return kernel(time, dim, max_period)
