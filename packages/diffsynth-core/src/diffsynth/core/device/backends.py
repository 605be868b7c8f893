"""Which device backends there are, what each one has, and torch's module for it.

CUDA stands for ROCm, too: torch calls both "cuda". A new backend is a `Backend` here and a row in `docs/devices.md`.
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
"""Dtypes that `Tensor.to` converts from and to on the CPU and on CUDA; torch's packed ones (float4, int1 ...) not."""


@dataclass(frozen=True)
class Backend:
    """What one kind of device has.

    Attributes:
        kind: torch's device type, and the name of its module: `torch.<kind>`.
        label: how people call it.
        collectives: what torch.distributed uses there.
        indexed: more than one can be there, "cuda:0" and "cuda:1".
        streams: queues and events beside the current one; without, everything happens in order.
        pins: copies from pinned host memory go on while the host does.
        counts: torch's allocator tells what is allocated, reserved and free, and the peak.
        lacks: of `CONVERTIBLE`, the dtypes that it has no conversion for.
        needs: what to install where torch alone does not bring it.
    """

    kind: str
    label: str
    collectives: str = "gloo"
    indexed: bool = False
    streams: bool = False
    pins: bool = False
    counts: bool = False
    lacks: frozenset[torch.dtype] = frozenset()
    needs: str = ""


_FULL = {"indexed": True, "streams": True, "pins": True, "counts": True}

BACKENDS = {
    backend.kind: backend
    for backend in (
        Backend("cuda", "CUDA", "nccl", **_FULL, needs="a torch built for CUDA or ROCm, and the driver"),
        # aclnnCast of CANN 8 and 9: no float8 on Atlas A2 and A3; Ascend 950 has some, refused here all the same.
        Backend("npu", "Ascend NPU", "hccl", **_FULL, lacks=_FLOAT8, needs="torch_npu and CANN"),
        # Metal has no 64-bit floats; float8: pytorch/pytorch#148420, open in June 2026.
        Backend(
            "mps",
            "MPS",
            lacks=_FLOAT8 | {torch.float64, torch.complex128},
            needs="macOS on Apple silicon",
        ),
        Backend("cpu", "CPU"),
    )
}
"""By kind, in the order they are preferred."""

ACCELERATORS = tuple(kind for kind in BACKENDS if kind != "cpu")
"""In the order they are preferred."""


def parts(device: torch.device | str | int) -> tuple[str, int | None]:
    """Type and index of a device or its name.

    Names are read here, not by torch: it knows no "npu" where torch_npu is missing, and takes "cuda:256" for "cuda:0".

    Raises:
        ValueError: a name with something else than a number behind its colon.
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
    """`torch.cuda`, `torch.npu` or `torch.mps`; None for the CPU and where this torch has no such module."""
    return None if kind == "cpu" else getattr(torch, kind, None)


def is_available(kind: str) -> bool:
    """Whether a device of this kind is on this machine, and torch can use it."""
    if kind == "cpu":
        return True
    if kind == "mps":
        return torch.backends.mps.is_available()
    module = torch_module(kind)
    return module is not None and bool(module.is_available())


def driven(device: torch.device | str) -> tuple[Backend, Any]:
    """The backend of a device and torch's module for it.

    Raises:
        ValueError: a kind of device that diffsynth does not know.
    """
    kind, _ = parts(device)
    if kind not in BACKENDS:
        raise ValueError(f"device type {kind!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[kind], torch_module(kind)
