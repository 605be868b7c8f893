"""How the kernels are cut into blocks, by architecture: a table, so that no first call tunes for minutes.

`benchmarks/kernels/compile.py` compiles rows without a GPU, and its README lists what they take. Those of sm_80 and
sm_90 must neither spill nor want too much shared memory. Whether a row is fast, only a GPU tells: until somebody timed
it there it is `tuned=False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["fwd", "dkdv", "dq"]


@dataclass(frozen=True)
class Config:
    """One cut.

    Args:
        kernel: which one.
        head_dim: of the padded block, the larger of `d` and `d_v`; 64 stands for what is smaller, too.
        block_m: queries of a block.
        block_n: keys of a block.
        num_warps, num_stages: launch options.
        tuned: timed on this architecture, against its neighbours. False is untuned: a guess.
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
"""For fp32 on every architecture. Full fp32 products run outside the matrix units: there for truth, not for speed."""

INTERPRETED = tuple(Config(kernel, 256, 32, 32, 1, 1) for kernel in ("fwd", "dkdv", "dq"))
"""For Triton's interpreter on a CPU."""


def rows_for(capability: int | None, *, fp32: bool) -> tuple[Config, ...]:
    """The rows for a compute capability (90 is sm_90), or for the interpreter where it is None.

    One that is not in the table takes the rows of the next older one; 120 has the small shared memory of 89.
    """
    if capability is None:
        return INTERPRETED
    if fp32:
        return FP32
    if capability >= 120:
        return TABLE[89]
    return TABLE[max(known for known in TABLE if known <= capability)]


def config_for(kernel: Kernel, head_dim: int, capability: int | None, *, fp32: bool) -> Config:
    """The narrowest row of a kernel that holds `head_dim`, at most 256."""
    rows = rows_for(capability, fp32=fp32)
    return min((row for row in rows if row.kernel == kernel and row.head_dim >= head_dim), key=lambda row: row.head_dim)


def capability_of(device: torch.device) -> int | None:
    """Compute capability, 90 for sm_90; None on the CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
