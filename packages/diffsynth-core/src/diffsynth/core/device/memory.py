"""Total, free, used and peak memory of a device, None if it is not available; and pinned host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffsynth.core.device.backends import Backend, backend_and_module, is_available
from diffsynth.core.device.names import default_device
from diffsynth.terminal import module_logger

_log = module_logger(__name__)

_warned: set[str] = set()
"""Labels of backends for which a warning was logged."""

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_SELF = Path("/proc/self")


def available_memory(device: torch.device | str) -> int | None:
    """Return the free memory of a device (CPU: of the host or container) in bytes; None if unknown (MPS, no /proc, no
    device).
    """
    backend, module = _available_backend(device)
    if backend.kind == "cpu":
        return _free_host_memory()
    if not backend.memory_stats or module is None:
        return None
    device = torch.device(device)
    # Memory that torch's allocator has reserved is free for tensors, although the driver reports it as used.
    reserve = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0]) + int(reserve)


def total_memory(device: torch.device | str) -> int | None:
    """Return the total memory of a device (CPU: of the host or container) in bytes; None if unknown (no /proc, no
    device).

    On the CPU within a container the lower of the host's memory and the container's limit; on MPS the maximum that
    Metal recommends.
    """
    backend, module = _available_backend(device)
    if backend.kind == "cpu":
        return _host_memory()
    if module is None:
        return None
    if backend.memory_stats:
        return int(module.mem_get_info(torch.device(device))[1])
    return int(module.recommended_max_memory()) if backend.kind == "mps" else None


def memory_in_use(device: torch.device | str) -> int | None:
    """Return the bytes that this process's tensors occupy on a device, on the CPU its VmRSS; None if unknown."""
    backend, module = _available_backend(device)
    if backend.kind == "cpu":
        return _status("VmRSS")
    if module is None:
        return None
    if backend.memory_stats:
        return int(module.memory_allocated(torch.device(device)))
    return int(module.current_allocated_memory()) if backend.kind == "mps" else None


def peak_memory(device: torch.device | str) -> int | None:
    """Return the peak of `memory_in_use` (bytes of this process on a device) since the start or `reset_peak_memory`;
    None if unknown.

    On the CPU this is VmHWM. Unknown are MPS and hosts without /proc.
    """
    backend, module = _available_backend(device)
    if backend.kind == "cpu":
        return _status("VmHWM")
    return (
        int(module.max_memory_allocated(torch.device(device))) if backend.memory_stats and module is not None else None
    )


def reset_peak_memory(device: torch.device | str) -> bool:
    """Restart the measurement of `peak_memory` (bytes of this process on a device); return a bool, whether that was
    possible.
    """
    backend, module = _available_backend(device)
    if backend.kind == "cpu":
        return _reset_status()
    if not backend.memory_stats or module is None:
        return False
    module.reset_peak_memory_stats(torch.device(device))
    return True


def empty_cache(device: torch.device | str | None = None) -> None:
    """Free the unused blocks that torch's allocator keeps on a device (None: the default device); do nothing on the
    CPU.
    """
    _, module = backend_and_module(default_device() if device is None else device)
    if module is not None:
        module.empty_cache()


def pinned_memory(size: int, device: torch.device | str) -> torch.Tensor:
    """Return a uint8 tensor of `size` bytes in host memory, pinned if possible, for asynchronous copies to a device.

    torch's allocator rounds sizes up to a power of two, so callers should ask for 2**n bytes. On MPS and the CPU, and
    if the system pins no more memory (logged once), this is pageable memory, whose copies block the host.
    """
    backend, _ = backend_and_module(device)
    if backend.pinned_memory and is_available(backend.kind):
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _warn_once(backend.label, size, " ".join(str(error).split()))
    return torch.empty(size, dtype=torch.uint8)


def _available_backend(device: torch.device | str) -> tuple[Backend, Any]:
    """Return a tuple: the device's `Backend`, and torch's module for it, None on the CPU and if there is no such
    device.
    """
    backend, module = backend_and_module(device)
    return backend, module if is_available(backend.kind) else None


def _warn_once(label: str, size: int, reason: str) -> None:
    if label not in _warned:
        _warned.add(label)
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
    """Return the bytes in a file's line of `field`: 1,748,992 for `VmHWM:  1708 kB`; None without file or line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _reset_status() -> bool:
    try:
        # proc(5): 5 resets VmHWM to the current VmRSS.
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _cgroup_limit() -> int | None:
    """Return the memory limit of the container in bytes (cgroup v2); None without a limit that can be read."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def _free_in_cgroup() -> int | None:
    """Return how many bytes the container (cgroup v2) may still use, at least 0; None without a limit that can be read.

    /proc/meminfo is for the machine.
    """
    limit = _cgroup_limit()
    if limit is None:
        return None
    try:
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    # The kernel reclaims inactive file pages when memory is needed.
    return max(limit - used + int(stat.get("inactive_file", 0)), 0)
