"""Which fused kernels can serve a call, and why not.

The answer depends on the call alone: its devices, dtypes, shapes, and whether a gradient is needed. Nothing is timed
and nothing is probed at import. Where a kernel refuses, the naive twin in `diffsynth.nn.naive` runs, and the reason is
logged once, at debug level; `why_not` tells it to whoever asks.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from diffsynth import _env
from diffsynth.errors import did_you_mean

logger = logging.getLogger(__name__)

KERNELS = ("gated_activation", "norm", "norm_rotary", "sinusoidal_embedding")
"""`norm` is also `modulate` and `gated_residual`; `norm_rotary` is also RoPE alone."""

MAX_WIDTH = 16384
"""Elements that one program holds in registers: a row of `norm`, all heads of a token of `norm_rotary`."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_told: set[tuple[str, str]] = set()


def why_not(kernel: str, *tensors: Tensor | None) -> str | None:
    """Why this kernel cannot serve a call with these tensors, or None if it can.

    Args:
        kernel: one of `KERNELS`.
        tensors: what the call reads, the one that gives the result its shape first; None for what is left out.

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
    """Why no kernel runs on this kind of device, or None."""
    if not _env.fused_kernels():
        return "DIFFSYNTH_FUSED_KERNELS is off"
    if device_type != "cuda":
        return f"tensors are on {device_type}; the kernels run on cuda"
    return None if _triton_is_installed() else "triton is not installed"


# What torch.compiler.assume_constant_result() sets; calling it would load the compiler at import.
no_kernels_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(kernel: str, reason: str | None) -> bool:
    """Whether the reason is none; a reason is logged the first time that it comes up."""
    if reason is not None and not torch.compiler.is_compiling() and (kernel, reason) not in _told:
        _told.add((kernel, reason))
        logger.debug("%s runs as plain torch: %s", kernel, reason)
    return reason is None


def broadcasts(x: Tensor, *others: Tensor | None) -> str | None:
    """Why `others` cannot be read beside `x` (`b s e`) by `norm`, or None: each is `#b #s e`."""
    for other in others:
        if other is None:
            continue
        if x.ndim != 3 or other.ndim != 3 or other.shape[2] != x.shape[2]:
            return f"shapes are {tuple(x.shape)} and {tuple(other.shape)}; the kernel takes 'b s e' and '#b #s e'"
        if other.shape[0] not in (1, x.shape[0]) or other.shape[1] not in (1, x.shape[1]):
            return f"shape {tuple(other.shape)} does not broadcast to {tuple(x.shape)}"
    return None


def too_wide(width: int) -> str | None:
    """Why a program cannot hold that many elements, or None."""
    return f"{width} elements to normalise together; at most {MAX_WIDTH}" if width > MAX_WIDTH else None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
