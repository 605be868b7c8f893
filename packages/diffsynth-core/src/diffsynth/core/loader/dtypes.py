"""The dtypes of the safetensors format: their names, their sizes, and their counterparts in torch.

torch is imported only by the functions that return its dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F4": (4, ""), "F6_E2M3": (6, ""), "F6_E3M2": (6, ""),
    "BOOL": (8, "bool"), "U8": (8, "uint8"), "I8": (8, "int8"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"), "U16": (16, "uint16"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "I32": (32, "int32"), "U32": (32, "uint32"), "F32": (32, "float32"),
    "I64": (64, "int64"), "U64": (64, "uint64"), "F64": (64, "float64"), "C64": (64, "complex64"),
}  # fmt: skip
"""Name in a header -> bits per element, and the name in torch; empty where torch has no such dtype."""

BITS: Mapping[str, int] = {name: bits for name, (bits, _) in _DTYPES.items()}
"""Name in a header -> bits per element."""


@functools.cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """Return a dict safetensors name of a dtype -> `torch.dtype`, `"BF16"` -> `torch.bfloat16`, for dtypes that torch
    has.
    """
    import torch

    return {name: getattr(torch, own) for name, (_, own) in _DTYPES.items() if own}


@functools.cache
def dtype_names() -> Mapping[torch.dtype, str]:
    """Return a dict `torch.dtype` -> its safetensors name, `torch.bfloat16` -> `"BF16"`, for dtypes that the format
    has.
    """
    return {dtype: name for name, dtype in torch_dtypes().items()}
