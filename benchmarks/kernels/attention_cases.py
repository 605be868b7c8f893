"""Cases of `compile.py` for the kernels of `diffsynth.core.attention.triton`, for each row of their table.

A row is compiled with masks, windows, packed samples, a smaller head dim, and, forward, 8-bit queries and keys. The
small kernels around attention are in `preparing_cases.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from offline import Case

from diffsynth.core.attention.triton import backward, configs, forward, op

_KERNELS = {"fwd": forward.flash_fwd_kernel, "dkdv": backward.flash_dkdv_kernel, "dq": backward.flash_dq_kernel}
_VARIANTS = {
    "plain": {},
    "mask": {"HAS_MASK": True},
    "window": {"HAS_LEFT": True, "HAS_RIGHT": True},
    "packed": {"SAMPLES": 8},
}
_INT8_VARIANTS = ("plain", "mask", "window")
_NARROWER = {64: 48, 128: 96, 256: 192}
"""Head dims that fill a part of a row's blocks. They are multiples of 16, as `op.aligned` ensures;
`tiles.aligned_rows` does the same for masks."""


def cases() -> Iterator[Case]:
    """Yield every row of the table in every variant; the default ones are bf16, head dim 128, plain, for sm_90."""
    for arch, rows in configs.TABLE.items():
        for row in rows:
            for variant in _VARIANTS:
                yield _case(row, arch, variant, "bf16", row.head_dim)
            yield _case(row, arch, "plain", "bf16", _NARROWER[row.head_dim])
            if row.kernel == "fwd":
                for variant in _INT8_VARIANTS:
                    yield _case(row, arch, variant, "int8", row.head_dim)
    for row in configs.FP32:
        yield _case(row, 80, "plain", "fp32", row.head_dim)


def _case(row: configs.Config, arch: int, variant: str, dtype: str, head_dim: int) -> Case:
    kernel = _KERNELS[row.kernel]
    flags = {"HAS_LEFT": False, "HAS_RIGHT": False, "HAS_MASK": False, "SAMPLES": 0, "Q_PER_KV": 1}
    flags |= _VARIANTS[variant]
    sizes = {"D": head_dim, "D_V": head_dim, "BLOCK_D": op.padded(head_dim), "BLOCK_DV": op.padded(head_dim)}
    constexprs = {**sizes, **flags, "BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "stride_mk": 1}
    if row.kernel == "fwd":
        constexprs |= {"INT8": dtype == "int8"}
    if row.kernel == "fwd" and dtype != "int8":
        constexprs |= {"q_scales": None, "k_scales": None}
    if not flags["HAS_MASK"]:
        constexprs |= dict.fromkeys(("mask", "blocks", "counts"))
    if not flags["SAMPLES"]:
        constexprs |= dict.fromkeys(("cu_q", "cu_k"))
    wide = "bf16" if dtype == "int8" else dtype
    types = dict.fromkeys(("v", "out", "d_out", "dq", "dk", "dv"), f"*{wide}:16")
    types |= dict.fromkeys(("q", "k"), "*i8:16" if dtype == "int8" else f"*{dtype}:16")
    types |= dict.fromkeys(("q_scales", "k_scales"), "*fp32:16")
    types |= dict.fromkeys(("lse", "delta"), "*fp32:16") | dict.fromkeys(
        ("blocks", "counts", "cu_q", "cu_k"), "*i32:16"
    )
    types |= {"mask": "*i1:16"} | dict.fromkeys(("scale", "scale_log2"), "fp32")
    types |= {f"stride_{tensor}{axis}": "i32:16" for tensor in "qkv" for axis in "bsn"}
    types |= {f"stride_m{axis}": "i32:16" for axis in "bnq"} | {f"stride_t{axis}": "i32" for axis in "bnt"}
    types |= dict.fromkeys(("heads", "tiles", "q_len", "k_len", "samples", "left", "right"), "i32")
    return Case(
        name=f"flash_{row.kernel}, {dtype}, head dim {head_dim}, {variant}",
        kernel=kernel,
        signature={name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constexprs},
        constexprs=constexprs,
        target=arch,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        tuned=row.tuned,
        is_default=variant == "plain" and dtype == "bf16" and head_dim == 128 and arch == 90,
    )
