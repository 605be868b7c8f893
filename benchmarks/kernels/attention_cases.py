"""The kernels of `diffsynth.core.attention.triton`, as `compile.py` compiles them, for each row of their table.

A row has to carry masks, windows, packed samples, the narrower of its head dims, and, forward, 8-bit queries and keys.
Those that prepare for them are in `preparing_cases.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from offline import Case

from diffsynth.core.attention.triton import backward, configs, forward

_KERNELS = {"fwd": forward.flash_fwd_kernel, "dkdv": backward.flash_dkdv_kernel, "dq": backward.flash_dq_kernel}
_VARIANTS = {
    "plain": {},
    "mask": {"HAS_MASK": True},
    "window": {"HAS_LEFT": True, "HAS_RIGHT": True},
    "packed": {"SAMPLES": 8},
}
_INT8_VARIANTS = ("plain", "mask", "window")


def cases() -> Iterator[Case]:
    """Every row of the table in every variant; the default one is bf16, head dim 128, plain."""
    for arch, rows in configs.TABLE.items():
        for row in rows:
            for variant in _VARIANTS:
                yield _case(row, arch, variant, "bf16")
            yield _case(row, arch, "plain", "bf16", narrower=4)
            if row.kernel == "fwd":
                for variant in _INT8_VARIANTS:
                    yield _case(row, arch, variant, "int8")
    for row in configs.FP32:
        yield _case(row, 80, "plain", "fp32")


def _case(row: configs.Config, arch: int, variant: str, dtype: str, *, narrower: int = 0) -> Case:
    """`narrower`: how much smaller the head dim is than the row's, so that rows are no multiples of 16 bytes."""
    kernel, head_dim = _KERNELS[row.kernel], row.head_dim - narrower
    flags = {"HAS_LEFT": False, "HAS_RIGHT": False, "HAS_MASK": False, "SAMPLES": 0} | _VARIANTS[variant]
    sizes = {"Q_PER_KV": 1, "D": head_dim, "D_V": head_dim, "BLOCK_D": row.head_dim, "BLOCK_DV": row.head_dim}
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
    # Strides of tensors whose rows begin at multiples of 16 bytes, as the models' do.
    stride = "i32" if narrower else "i32:16"
    types |= {f"stride_{tensor}{axis}": stride for tensor in "qkv" for axis in "bsn"}
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
        is_default=variant == "plain" and dtype == "bf16" and head_dim == 128 and arch in (80, 90),
    )
