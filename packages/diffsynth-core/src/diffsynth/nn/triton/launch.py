"""Helpers for launching kernels: tracing by torch.compile, dense rows, strides and block sizes."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction


def launchable(kernel: Any) -> Any:
    """Return a wrapper of a Triton kernel, launched as `[grid](...)`, that torch.compile can trace in a `triton_op`.

    Under TRITON_INTERPRET=1 a kernel is a Python function, which is returned unchanged.
    """
    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def dense_rows(x: Tensor) -> Tensor:
    """Return `x` itself if its last axis has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tuple of the strides, in elements, of the first `len(sizes)` axes of `x`; 0 for an axis of size 1 that
    is broadcast to `sizes`.
    """
    return tuple(
        0 if own == 1 and size != 1 else x.stride(axis)
        for axis, (own, size) in enumerate(zip(x.shape[: len(sizes)], sizes, strict=True))
    )


def warps(elements: int) -> int:
    """Return the number of warps, an int, for a block of `elements`: 16 elements per thread, but at least 1 and at most
    16 warps.
    """
    return min(max(elements // 512, 1), 16)


def block(size: int) -> int:
    """Return the smallest power of two that is at least `size`, an int."""
    # While torch.compile traces, `size` may be symbolic, and next_power_of_2() would not terminate: int() makes it a
    # constant of the graph.
    return triton.next_power_of_2(int(size))
