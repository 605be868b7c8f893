"""Cases of `compile.py` for the small kernels around attention: delta, block states of a mask, quantization.

Their block sizes are those of the attention kernels, from `configs.TABLE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from offline import Case

from diffsynth.core.attention.triton import backward, configs, int8, op, tiles

_WARPS, _STAGES = 4, 3
"""Triton's defaults for num_warps and num_stages."""


def cases() -> Iterator[Case]:
    """Yield one case for each block size of the table; the default ones are those of head dim 128."""
    for arch, rows in configs.TABLE.items():
        for head_dim in (64, 128, 256):
            yield _delta(head_dim, arch)
        for block_m, block_n in sorted({(row.block_m, row.block_n) for row in rows}):
            yield _mask_tiles(block_m, block_n, arch)
        for row in rows:
            if row.kernel == "fwd":
                yield _quantize("queries", row.head_dim, row.block_m, arch)
                yield _quantize("keys", row.head_dim, row.block_n, arch)


def _delta(head_dim: int, arch: int) -> Case:
    types = {"out": "*bf16:16", "d_out": "*bf16:16", "delta": "*fp32:16"} | dict.fromkeys(
        ("heads", "rows", "q_len"), "i32"
    )
    constexprs = {"D_V": head_dim, "BLOCK_DV": head_dim, "BLOCK_M": op.DELTA_ROWS}
    return _case(f"flash_delta, bf16, head dim {head_dim}", backward.flash_delta_kernel, types, constexprs, arch)


def _mask_tiles(block_m: int, block_n: int, arch: int) -> Case:
    types = {"mask": "*i1:16", "state": "*i8:16"} | {f"stride_m{axis}": "i32:16" for axis in "bnq"}
    types |= dict.fromkeys(("heads", "q_len", "k_len", "left", "right"), "i32")
    constexprs = {"stride_mk": 1, "HAS_LEFT": True, "HAS_RIGHT": True, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return _case(f"mask_tiles, {block_m} x {block_n}, window", tiles.mask_tiles_kernel, types, constexprs, arch)


def _quantize(what: str, head_dim: int, block: int, arch: int) -> Case:
    types = {"x": "*bf16:16", "quantized": "*i8:16", "scales": "*fp32:16"}
    types |= {f"stride_{axis}": "i32:16" for axis in "bsn"} | dict.fromkeys(("heads", "tiles", "length"), "i32")
    constexprs: dict[str, Any] = {"D": head_dim, "BLOCK_D": head_dim, "BLOCK": block, "HAS_MEAN": what == "keys"}
    if what == "keys":
        types["mean"] = "*fp32:16"
    else:
        constexprs["mean"] = None
    return _case(f"quantize, {what}, bf16, head dim {head_dim}", int8.quantize_kernel, types, constexprs, arch)


def _case(name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], arch: int) -> Case:
    default = "head dim 128" in name or name.startswith("mask_tiles, 128 x 64")
    return Case(name, kernel, types, constexprs, arch, _WARPS, _STAGES, is_default=arch == 90 and default)
