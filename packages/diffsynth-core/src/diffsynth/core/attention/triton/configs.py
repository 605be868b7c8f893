"""Block sizes and launch options of the kernels by architecture, in a table instead of autotuning at the first call.

`benchmarks/kernels/compile.py` compiles rows without a GPU, and its README lists registers and shared memory. Rows of
sm_80 and sm_90 must neither spill nor exceed the shared memory. A row that was not timed on its GPU is `tuned=False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["fwd", "dkdv", "dq"]


@dataclass(frozen=True)
class Config:
    """Block sizes and launch options of one kernel for one head dim.

    Args:
        kernel: forward, gradients of keys and values, or gradient of queries.
        head_dim: largest padded head dim of `d` and `d_v` that the row is for.
        block_m: queries per block.
        block_n: keys per block.
        num_warps, num_stages: launch options of Triton.
        tuned: whether it was timed on this architecture against neighbouring configurations.
    """

    kernel: Kernel
    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tuned: bool = False


_SM_80 = (
    Config("fwd", 64, 128, 64, 8, 3),
    Config("fwd", 128, 128, 32, 8, 3),
    Config("fwd", 256, 64, 32, 8, 2),
    Config("dkdv", 64, 32, 32, 4, 2),
    Config("dkdv", 128, 32, 64, 8, 2),
    Config("dkdv", 256, 16, 64, 8, 1),
    Config("dq", 64, 128, 64, 8, 2),
    Config("dq", 128, 64, 32, 8, 2),
    Config("dq", 256, 32, 32, 8, 1),
)
_SM_86 = (
    Config("fwd", 64, 128, 64, 8, 2),
    Config("fwd", 128, 128, 32, 8, 2),
    Config("fwd", 256, 64, 32, 8, 1),
    Config("dkdv", 64, 32, 32, 4, 2),
    Config("dkdv", 128, 32, 64, 8, 2),
    Config("dkdv", 256, 16, 32, 8, 1),
    Config("dq", 64, 64, 32, 4, 2),
    Config("dq", 128, 64, 32, 8, 1),
    Config("dq", 256, 32, 32, 8, 1),
)
_SM_90 = (
    Config("fwd", 64, 128, 128, 8, 3),
    Config("fwd", 128, 128, 64, 8, 3),
    Config("fwd", 256, 64, 32, 8, 2),
    Config("dkdv", 64, 64, 128, 8, 2),
    Config("dkdv", 128, 32, 128, 8, 1),
    Config("dkdv", 256, 16, 32, 8, 1),
    Config("dq", 64, 128, 64, 8, 2),
    Config("dq", 128, 128, 64, 8, 2),
    Config("dq", 256, 32, 32, 4, 1),
)

_SM_100 = (
    Config("fwd", 64, 128, 128, 8, 3),
    Config("fwd", 128, 128, 64, 8, 3),
    Config("fwd", 256, 64, 32, 8, 2),
    Config("dkdv", 64, 64, 128, 8, 1),
    Config("dkdv", 128, 32, 128, 8, 1),
    Config("dkdv", 256, 16, 32, 8, 1),
    Config("dq", 64, 128, 64, 8, 2),
    Config("dq", 128, 128, 64, 8, 2),
    Config("dq", 256, 32, 32, 4, 1),
)

TABLE: dict[int, tuple[Config, ...]] = {80: _SM_80, 86: _SM_86, 89: _SM_86, 90: _SM_90, 100: _SM_100}
"""Compute capability -> rows for 16-bit tensors."""

FP32: tuple[Config, ...] = (
    Config("fwd", 64, 32, 32, 4, 1),
    Config("fwd", 128, 16, 16, 4, 1),
    Config("fwd", 256, 16, 16, 4, 1),
    Config("dkdv", 64, 32, 32, 4, 1),
    Config("dkdv", 128, 16, 16, 4, 1),
    Config("dkdv", 256, 16, 16, 4, 1),
    Config("dq", 64, 32, 32, 4, 1),
    Config("dq", 128, 32, 16, 4, 1),
    Config("dq", 256, 16, 16, 4, 1),
)
"""Rows for fp32 on every architecture. Exact fp32 products do not run on the matrix units and are slow."""

INTERPRETED = tuple(Config(kernel, 256, 32, 32, 1, 1) for kernel in ("fwd", "dkdv", "dq"))
"""Rows for Triton's interpreter on a CPU."""


def rows_for(capability: int | None, *, fp32: bool) -> tuple[Config, ...]:
    """Return a tuple of `Config`s (block sizes), one per kernel and head dim, for a CUDA compute capability (90 is
    sm_90; None is Triton's interpreter) and fp32 or 16-bit tensors.

    A capability that is not in the table uses the rows of the next older one; 120 has the small shared memory of 89.
    """
    if capability is None:
        return INTERPRETED
    if fp32:
        return FP32
    if capability >= 120:
        return TABLE[89]
    return TABLE[max(known for known in TABLE if known <= capability)]


def config_for(kernel: Kernel, head_dim: int, capability: int | None, *, fp32: bool) -> Config:
    """Return the `Config` (block sizes) of `kernel` for the smallest listed head dim of at least `head_dim`; raise
    ValueError above 256.
    """
    rows = rows_for(capability, fp32=fp32)
    return min((row for row in rows if row.kernel == kernel and row.head_dim >= head_dim), key=lambda row: row.head_dim)


def capability_of(device: torch.device) -> int | None:
    """Return the CUDA compute capability of a device as an int, such as 90 for sm_90; None for the CPU."""
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
