"""The device backends, their features, and their torch modules.

"cuda" is CUDA and ROCm, as in torch. A new backend is a `Backend` here, its link in `speed.py`
(`_LINKS`), and a row in `docs/devices.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_FLOAT8 = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)

CONVERTIBLE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    *sorted(_FLOAT8, key=str),
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex32,
    torch.complex64,
    torch.complex128,
)
"""Dtypes that `Tensor.to` converts from and to on the CPU and on CUDA; not torch's packed dtypes (float4, int1 ...)."""


@dataclass(frozen=True)
class Backend:
    """The features of one kind of device.

    Attributes:
        kind: torch's device type, and the name of its module: `torch.<kind>`.
        label: name for messages.
        collectives: backend of torch.distributed for it.
        indexed: whether a machine can have several, "cuda:0" and "cuda:1".
        streams: whether it has streams and events; without them work runs in order.
        pinned_memory: whether copies from pinned host memory are asynchronous.
        memory_stats: whether torch's allocator reports allocated, reserved, free and peak memory.
        unsupported_dtypes: dtypes of `CONVERTIBLE` that it has no conversion for.
        requirement: what must be installed beside torch, for messages.
    """

    kind: str
    label: str
    collectives: str = "gloo"
    indexed: bool = False
    streams: bool = False
    pinned_memory: bool = False
    memory_stats: bool = False
    unsupported_dtypes: frozenset[torch.dtype] = frozenset()
    requirement: str = ""


_FULL = {"indexed": True, "streams": True, "pinned_memory": True, "memory_stats": True}

BACKENDS = {
    backend.kind: backend
    for backend in (
        Backend("cuda", "CUDA", "nccl", **_FULL, requirement="a torch built for CUDA or ROCm, and the driver"),
        # aclnnCast of CANN 8 and 9: no float8 on Atlas A2 and A3; Ascend 950 has some, but is treated alike.
        Backend("npu", "Ascend NPU", "hccl", **_FULL, unsupported_dtypes=_FLOAT8, requirement="torch_npu and CANN"),
        # Metal has no 64-bit floats; float8: pytorch/pytorch#148420, open in June 2026.
        Backend(
            "mps",
            "MPS",
            unsupported_dtypes=_FLOAT8 | {torch.float64, torch.complex128},
            requirement="macOS on Apple silicon",
        ),
        Backend("cpu", "CPU"),
    )
}
"""Kind -> backend, in order of preference."""

ACCELERATORS = tuple(kind for kind in BACKENDS if kind != "cpu")
"""Kinds other than the CPU, in order of preference."""


def type_and_index(device: torch.device | str | int) -> tuple[str, int | None]:
    """Return a tuple (type, index) of a device or its name, `("cuda", 1)` for `"cuda:1"`; the index is None if it has
    none.

    Names are not parsed by torch, which does not know "npu" without torch_npu, and reads "cuda:256" as "cuda:0".

    Raises:
        ValueError: a name whose index is not a number.
    """
    if not isinstance(device, str):
        parsed = torch.device(device)
        return parsed.type, parsed.index
    kind, colon, index = device.partition(":")
    if not colon:
        return kind, None
    if not index.isdecimal():
        raise ValueError(f"device {device!r}: expected a name such as 'cuda:0'")
    return kind, int(index)


def torch_module(kind: str) -> Any:
    """Return torch's Python module for a device type, `torch.cuda` for "cuda"; None for "cpu", or if torch has none."""
    return None if kind == "cpu" else getattr(torch, kind, None)


def is_available(kind: str) -> bool:
    """Whether this machine has a device of this kind that torch can use."""
    if kind == "cpu":
        return True
    if kind == "mps":
        return torch.backends.mps.is_available()
    module = torch_module(kind)
    return module is not None and bool(module.is_available())


def backend_and_module(device: torch.device | str) -> tuple[Backend, Any]:
    """Return a tuple: a device's `Backend`, and torch's module for it, such as `torch.cuda` (None for the CPU, or if
    torch has none).

    Raises:
        ValueError: an unknown kind of device.
    """
    kind, _ = type_and_index(device)
    if kind not in BACKENDS:
        raise ValueError(f"device type {kind!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[kind], torch_module(kind)
