"""The one place that names a device backend: CUDA (and ROCm, which torch calls CUDA), Ascend NPU, MPS, CPU.

Where a backend lacks something, the fallback is stated here: MPS tells no free memory (None) and its generator is the
CPU's, the CPU has nothing to wait for and no cache to empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = [
    "ACCELERATORS",
    "IS_CUDA_AVAILABLE",
    "IS_NPU_AVAILABLE",
    "available_memory",
    "default_device",
    "empty_cache",
    "enable_high_precision_for_bf16",
    "generator",
    "get_available_device_type",
    "get_device_id",
    "get_device_name",
    "get_device_type",
    "get_nccl_backend",
    "get_torch_device",
    "mark",
    "page_locked",
    "parse_device_type",
    "parse_nccl_backend",
    "synchronize",
]

ACCELERATORS = ("cuda", "npu", "mps")
"""In the order they are preferred."""

_COLLECTIVES = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo", "mps": "gloo"}
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def default_device() -> torch.device:
    """The first accelerator that is there, else the CPU."""
    return torch.device(get_device_type())


def available_memory(device: torch.device | str) -> int | None:
    """Free bytes on a device; None where the backend cannot tell (MPS, and hosts without /proc)."""
    device = torch.device(device)
    if device.type == "cpu":
        return _free_host_memory()
    backend = _backend(device.type)
    if device.type in ("cuda", "npu") and backend is not None:
        # What torch's allocator holds in reserve is free to us, though the driver counts it as taken.
        reserve = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0]) + int(reserve)
    return None


def generator(device: torch.device | str, seed: int | None = None) -> torch.Generator:
    """A random generator of this device, seeded if a seed is given; MPS draws on the CPU."""
    kind = torch.device(device).type
    made = torch.Generator("cpu" if kind == "mps" else device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


def synchronize(device: torch.device | str | None = None) -> None:
    """Wait for the device; nothing to wait for on the CPU. None is the default device."""
    device = default_device() if device is None else torch.device(device)
    backend = _backend(device.type)
    if device.type == "mps" and backend is not None:
        backend.synchronize()
    elif backend is not None:
        backend.synchronize(device)


def page_locked(size: int, device: torch.device | str) -> torch.Tensor:
    """Bytes of host memory that a device copies from while the host goes on; ordinary memory where there is none."""
    kind = torch.device(device).type
    return torch.empty(size, dtype=torch.uint8, pin_memory=kind in ("cuda", "npu") and _is_available(kind))


def mark(device: torch.device | str) -> Any:
    """An event behind all that the device was given so far; its `synchronize()` waits for that.

    None where there is nothing to wait for, or no events (MPS): there the wait is now.
    """
    device = torch.device(device)
    backend = _backend(device.type)
    if device.type not in ("cuda", "npu") or backend is None:
        synchronize(device)
        return None
    event = backend.Event()
    event.record(backend.current_stream(device))
    return event


def empty_cache(device: torch.device | str | None = None) -> None:
    """Give cached blocks back to the driver; nothing on the CPU. None is the default device."""
    backend = _backend(default_device().type if device is None else torch.device(device).type)
    if backend is not None:
        backend.empty_cache()


def get_device_type() -> str:
    """ "cuda", "npu", "mps" or "cpu": the type of `default_device()`."""
    return next((kind for kind in ACCELERATORS if _is_available(kind)), "cpu")


get_available_device_type = get_device_type


def get_device_name() -> str:
    """The default device with its index, "cuda:0"; "cpu" and "mps" have none."""
    kind = get_device_type()
    return f"{kind}:{get_device_id()}" if kind in ("cuda", "npu") else kind


def get_device_id() -> int:
    """Index of the current device of the default kind; 0 where there is only one."""
    kind = get_device_type()
    return int(_backend(kind).current_device()) if kind in ("cuda", "npu") else 0


def get_torch_device() -> Any:
    """torch's module for the default device: `torch.cuda`, `torch.npu`, `torch.mps` or `torch.cpu`."""
    return getattr(torch, get_device_type())


def parse_device_type(device: torch.device | str) -> str:
    """The type in a device or its name, `"cuda"` of `"cuda:1"`."""
    return torch.device(device).type


def parse_nccl_backend(device_type: str) -> str:
    """The collectives that torch.distributed uses on a device type: "nccl", "hccl" or "gloo".

    Raises:
        ValueError: an unknown type.
    """
    if device_type not in _COLLECTIVES:
        raise ValueError(f"device type {device_type!r}: expected one of {', '.join(_COLLECTIVES)}")
    return _COLLECTIVES[device_type]


def get_nccl_backend() -> str:
    """The collectives of the default device."""
    return parse_nccl_backend(get_device_type())


def enable_high_precision_for_bf16() -> None:
    """Turn TF32 and reduced-precision bf16 sums of matrix products off, process-wide. Nothing on MPS and the CPU."""
    kind = get_device_type()
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif kind == "npu":
        # Ascend's counterpart of TF32.
        _backend(kind).matmul.allow_hf32 = False


def __getattr__(name: str) -> bool:
    if name == "IS_CUDA_AVAILABLE":
        return _is_available("cuda")
    if name == "IS_NPU_AVAILABLE":
        return _is_available("npu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_available(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    backend = _backend(kind)
    return backend is not None and bool(backend.is_available())


def _backend(kind: str) -> Any:
    return None if kind == "cpu" else getattr(torch, kind, None)


def _free_host_memory() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    if "MemAvailable" not in fields:
        return None
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = _free_in_cgroup()
    return free if group is None else min(free, group)


def _free_in_cgroup() -> int | None:
    """What a container may still take (cgroup v2); /proc/meminfo speaks of the whole machine. None without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    # Cached file pages are given back when memory is wanted.
    return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)
