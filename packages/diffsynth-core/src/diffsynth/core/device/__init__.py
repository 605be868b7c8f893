"""The one place that names a device backend: CUDA (and ROCm, which torch calls CUDA), Ascend NPU, MPS, CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ACCELERATORS = ("cuda", "npu", "mps")


def default_device() -> torch.device:
    """The first accelerator that is there, else the CPU."""
    for kind in ACCELERATORS:
        if _is_available(kind):
            return torch.device(kind)
    return torch.device("cpu")


def available_memory(device: torch.device | str) -> int | None:
    """Free bytes on a device; None where the backend cannot tell."""
    kind = torch.device(device).type
    if kind == "cpu":
        return _free_host_memory()
    backend = _backend(kind)
    if kind in ("cuda", "npu") and backend is not None:
        return int(backend.mem_get_info(torch.device(device))[0])
    return None


def synchronize(device: torch.device | str) -> None:
    """Wait for the device; nothing to wait for on the CPU."""
    backend = _backend(torch.device(device).type)
    if backend is not None:
        backend.synchronize()


def empty_cache(device: torch.device | str) -> None:
    """Give cached blocks back to the driver; nothing on the CPU."""
    backend = _backend(torch.device(device).type)
    if backend is not None:
        backend.empty_cache()


def _is_available(kind: str) -> bool:
    backend = _backend(kind)
    return backend is not None and bool(backend.is_available())


def _backend(kind: str) -> Any:
    return None if kind == "cpu" else getattr(torch, kind, None)


def _free_host_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
