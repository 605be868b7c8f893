"""Memory that kernels take while they run, beside what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def workspace(func: Any, args: Sequence[Any], out: Any, device_type: str) -> int:
    """Bytes beside inputs and outputs; 0 for kernels that need none worth counting."""
    rule = _RULES.get((func.overloadpacket, device_type))
    return 0 if rule is None else rule(args, out)


def _convolution_on_cpu(args: Sequence[Any], out: Tensor) -> int:
    """As measured: oneDNN copies a contiguous input into its blocked layout, computes a blocked output, frees the first
    and copies the second. Kernels of one pixel and channels-last tensors need neither. Where oneDNN has no kernel for
    the dtype, torch unfolds the input.
    """
    x, weight = args[0], args[1]
    kernel = weight[0, 0].numel()
    if kernel == 1 or _is_channels_last(x):
        return 0
    if x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        blocked_in, blocked_out = _blocked_bytes(x), _blocked_bytes(out)
        return max(blocked_in + blocked_out - _bytes(out), blocked_out) + _bytes(weight)
    return x.shape[0] * x.shape[1] * kernel * out[0, 0].numel() * x.element_size()


def _blocked_bytes(x: Tensor) -> int:
    return -(-x.shape[1] // _LANES) * _LANES * x[:, 0].numel() * x.element_size()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.ndim])


_LANES = 8
"""Channels in a block of oneDNN's layout: 8 with AVX2; 16 with AVX-512, which differs for very few channels only."""

_RULES: dict[tuple[Any, str], Callable[[Sequence[Any], Any], int]] = {
    (_aten.convolution, "cpu"): _convolution_on_cpu,
}
"""(operation, device type) -> its workspace. Measured where a comment or a docstring says so."""
