"""What every launcher needs: a kernel that torch.compile can see, rows whose elements are neighbours, block sizes."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction


def launchable(kernel: Any) -> Any:
    """The kernel for `[grid](...)` inside a `triton_op`; under TRITON_INTERPRET=1 there is nothing to trace."""
    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def dense_rows(x: Tensor) -> Tensor:
    """`x`, or a copy of it, whose last axis has stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the leading axes of `x`, 0 where it has one entry for all of `sizes`."""
    return tuple(
        0 if own == 1 and size != 1 else x.stride(axis)
        for axis, (own, size) in enumerate(zip(x.shape[: len(sizes)], sizes, strict=True))
    )


def warps(elements: int) -> int:
    """Warps for a tile: 16 elements per thread, 1 to 16 warps."""
    return min(max(elements // 512, 1), 16)


def block(size: int) -> int:
    """The power of two that holds `size` elements."""
    # While torch.compile traces, a size may be a symbol: block sizes are of one width, and shifting symbols never ends.
    return triton.next_power_of_2(int(size))
