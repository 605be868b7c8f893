"""How much memory a device has, has free, and took, None for one that is not here; host memory that it copies from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from diffsynth.core.device.backends import Backend, driven, is_available
from diffsynth.core.device.names import default_device

_log = logging.getLogger(__name__)

_TOLD: set[str] = set()
"""Labels of backends for which a warning was logged."""

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_SELF = Path("/proc/self")


def available_memory(device: torch.device | str) -> int | None:
    """Free bytes on a device; None where the backend cannot tell (MPS, and hosts without /proc)."""
    backend, module = _here(device)
    if backend.kind == "cpu":
        return _free_host_memory()
    if not backend.counts or module is None:
        return None
    device = torch.device(device)
    # What torch's allocator holds in reserve is free to us, though the driver counts it as taken.
    reserve = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0]) + int(reserve)


def total_memory(device: torch.device | str) -> int | None:
    """Bytes that a device has, or that a container may take of the host's; None where nobody can tell.

    On MPS what Metal recommends as the most to use.
    """
    backend, module = _here(device)
    if backend.kind == "cpu":
        return _host_memory()
    if module is None:
        return None
    if backend.counts:
        return int(module.mem_get_info(torch.device(device))[1])
    return int(module.recommended_max_memory()) if backend.kind == "mps" else None


def memory_in_use(device: torch.device | str) -> int | None:
    """Bytes that tensors of this process take on a device; on the CPU what the whole process takes (VmRSS).

    None where nobody can tell.
    """
    backend, module = _here(device)
    if backend.kind == "cpu":
        return _status("VmRSS")
    if module is None:
        return None
    if backend.counts:
        return int(module.memory_allocated(torch.device(device)))
    return int(module.current_allocated_memory()) if backend.kind == "mps" else None


def peak_memory(device: torch.device | str) -> int | None:
    """The most that `memory_in_use` has been, since the start or `reset_peak_memory`; on the CPU VmHWM.

    None where nobody counts: on MPS, and on hosts without /proc.
    """
    backend, module = _here(device)
    if backend.kind == "cpu":
        return _status("VmHWM")
    return int(module.max_memory_allocated(torch.device(device))) if backend.counts and module is not None else None


def reset_peak_memory(device: torch.device | str) -> bool:
    """Have `peak_memory` count from now on; False where it does not count, or the system does not allow it."""
    backend, module = _here(device)
    if backend.kind == "cpu":
        return _reset_status()
    if not backend.counts or module is None:
        return False
    module.reset_peak_memory_stats(torch.device(device))
    return True


def empty_cache(device: torch.device | str | None = None) -> None:
    """Give cached blocks back to the driver; nothing on the CPU. None is the default device."""
    _, module = driven(default_device() if device is None else device)
    if module is not None:
        module.empty_cache()


def pinned_memory(size: int, device: torch.device | str) -> torch.Tensor:
    """Bytes of host memory that a device copies from while the host goes on.

    torch's allocator takes the next power of two of what is asked for: one slab of 2**n bytes, cut into parts, wastes
    nothing. Ordinary memory on MPS and the CPU, and, logged once, where the system locks no more: copies from it are
    right, but the host waits for them.
    """
    backend, _ = driven(device)
    if backend.pins and is_available(backend.kind):
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _tell_once(backend.label, size, " ".join(str(error).split()))
    return torch.empty(size, dtype=torch.uint8)


def _here(device: torch.device | str) -> tuple[Backend, Any]:
    """Like `driven`, but no module for a device that this machine lacks: nothing is known of its memory."""
    backend, module = driven(device)
    return backend, module if is_available(backend.kind) else None


def _tell_once(label: str, size: int, reason: str) -> None:
    if label not in _TOLD:
        _TOLD.add(label)
        _log.warning(
            "%d bytes of host memory cannot be pinned for %s (%s): copies from them will not overlap with "
            "computation. Raise the limit on locked memory, or free host memory",
            size,
            label,
            reason,
        )


def _free_host_memory() -> int | None:
    free = _meminfo("MemAvailable")
    group = _free_in_cgroup()
    return free if free is None or group is None else min(free, group)


def _host_memory() -> int | None:
    total, limit = _meminfo("MemTotal"), _cgroup_limit()
    return total if total is None or limit is None else min(total, limit)


def _meminfo(field: str) -> int | None:
    return _kilobytes(_MEMINFO, field)


def _status(field: str) -> int | None:
    return _kilobytes(_SELF / "status", field)


def _kilobytes(file: Path, field: str) -> int | None:
    """Bytes of a line such as `VmHWM:  1708 kB`; None without that file or line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _reset_status() -> bool:
    try:
        # proc(5): 5 sets VmHWM to what the process takes now.
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _cgroup_limit() -> int | None:
    """What a container may take in all (cgroup v2); None without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def _free_in_cgroup() -> int | None:
    """What a container may still take; /proc/meminfo speaks of the whole machine. None without a limit."""
    limit = _cgroup_limit()
    if limit is None:
        return None
    try:
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    # Cached file pages are given back when memory is wanted.
    return max(limit - used + int(stat.get("inactive_file", 0)), 0)
