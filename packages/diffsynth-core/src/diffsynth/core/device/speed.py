"""Speed of a link, a device and a disk, measured once per machine and stored in `speed.json` in the cache folder.

For a device that is not available the speed is an assumption, marked as such. Delete the file to measure again.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from diffsynth.core.device.backends import backend_and_module, is_available
from diffsynth.core.device.memory import pinned_memory
from diffsynth.core.device.names import card_name, check_device, check_dtype
from diffsynth.core.device.streams import synchronize
from diffsynth.core.json_cache import read_json_cache, update_json_cache

_CACHE = "speed.json"
_REPEATS = 5
_LINK_BYTES = 256 * 2**20
_DISK_BYTES = 128 * 2**20
_DISK_BLOCK, _DISK_THREADS = 8 * 2**20, 4
"""Block size and number of threads of the loader; one thread does not saturate an NVMe drive."""
_FIRST_WIDTH, _LAST_WIDTH, _LONG_ENOUGH = 256, 8192, 0.02
"""The width of the matrices grows until a product takes this many seconds; a CPU may be 10**6 times slower."""

_COMPUTES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Speed:
    """A measured or assumed speed.

    Attributes:
        value: bytes/s of a link or a disk, FLOP/s of a device; a product of two n x n matrices is 2 n**3 FLOP.
        measured: whether it was measured; False for an assumption.
        source: description of the measurement, or of the assumption and its reason.
    """

    value: float
    measured: bool
    source: str = ""


_PCIE = Speed(25e9, measured=False, source="assumed: PCIe 4.0 x16 reaches about 25 GB/s of its 31.5")
_LINKS = {
    "cuda": _PCIE,
    "npu": _PCIE,
    "mps": Speed(30e9, measured=False, source="assumed: a copy within the 68 GB/s of an Apple M1's memory"),
    "cpu": Speed(5e9, measured=False, source="assumed: a copy in the memory of a small machine"),
}
_RTX_4090 = "assumed: 60 % of an RTX 4090, whose data sheet says 165 TFLOP/s of bf16 and 83 of fp32"
_M2_MAX = Speed(8e12, measured=False, source="assumed: 60 % of the 13.6 TFLOP/s of an Apple M2 Max")
_NVME = Speed(3e9, measured=False, source="assumed: an NVMe drive on PCIe 3.0 x4 reads about 3 GB/s")


def link_speed(device: torch.device | str) -> Speed:
    """Return the `Speed`, in bytes/s, of copies from pinned host memory to a device (CPU: within host memory): cached,
    measured or else assumed.

    Measured with 256 MiB, the median of five; assumed if this machine has no such device or no free memory on it.

    Raises:
        ValueError: an unknown kind of device, or an index that does not exist.
    """
    backend, _ = backend_and_module(device)
    if not is_available(backend.kind):
        return _LINKS[backend.kind]
    device = check_device(device)
    return _once(f"link, {_hardware(device)}", lambda: _measure_link(device), _LINKS[backend.kind])


def compute_speed(device: torch.device | str, dtype: torch.dtype) -> Speed:
    """Return the `Speed`, in FLOP/s, of a large matrix product on a device in a dtype: cached, measured or else
    assumed.

    The median of five measurements; assumed if this machine has no such device or no free memory on it.

    Raises:
        ValueError: an unknown kind of device, an index that does not exist, or a dtype that is not measured.
    """
    backend, _ = backend_and_module(device)
    if check_dtype(dtype, device) not in _COMPUTES:
        names = ", ".join(str(one).removeprefix("torch.") for one in _COMPUTES)
        raise ValueError(f"{dtype}: matrix products are measured in {names}")
    assumed = _assumed_compute(backend.kind, dtype)
    if not is_available(backend.kind):
        return assumed
    device = check_device(device)
    return _once(f"compute, {_hardware(device)}, {dtype}", lambda: _measure_compute(device, dtype), assumed)


def disk_speed(folder: Path | str) -> Speed:
    """Return the `Speed`, in bytes/s, of reads from a folder's disk, without the page cache: cached, measured or else
    assumed.

    Four threads read a temporary file of 128 MiB, in the nearest existing parent if the folder does not exist. A drive
    with a cache of its own appears faster than it is. Assumed if nothing can be written, and where the page cache of a
    file cannot be dropped (macOS, Windows).
    """
    folder = Path(folder).absolute()
    folder = next(parent for parent in [folder, *folder.parents] if parent.is_dir())
    if not hasattr(os, "posix_fadvise"):
        return _NVME
    mount = next(parent for parent in [folder, *folder.parents] if parent.is_mount())
    return _once(f"disk, {platform.node()}, {mount}", lambda: _measure_disk(folder), _NVME)


def _assumed_compute(kind: str, dtype: torch.dtype) -> Speed:
    if kind == "mps":
        return _M2_MAX
    return Speed(100e12 if dtype.itemsize == 2 else 50e12, measured=False, source=_RTX_4090)


def _hardware(device: torch.device) -> str:
    cores = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{card_name(device)}{cores}, torch {torch.__version__}"


def _once(key: str, measure: Callable[[], float], assumed: Speed) -> Speed:
    """Return the cached `Speed` of `key`, else call `measure` and cache its value; if that fails, the value of
    `assumed`.
    """
    known = read_json_cache(_CACHE).get(key)
    if not isinstance(known, float):
        try:
            known = measure()
        except (OSError, RuntimeError) as error:
            return Speed(assumed.value, False, f"{assumed.source}; not measured: {' '.join(str(error).split())}")
        update_json_cache(_CACHE, key, known)
    return Speed(known, True, f"measured: {key}")


def _measure_link(device: torch.device) -> float:
    source = pinned_memory(_LINK_BYTES, device).fill_(1)
    destination = torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=device)
    return _LINK_BYTES / _seconds(lambda: destination.copy_(source, non_blocking=True), device)


def _measure_compute(device: torch.device, dtype: torch.dtype) -> float:
    width = _FIRST_WIDTH
    while (seconds := _product_seconds(width, device, dtype)) < _LONG_ENOUGH and width < _LAST_WIDTH:
        width *= 2
    return 2 * width**3 / seconds


def _product_seconds(width: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.full((width, width), 0.5, dtype=dtype, device=device) for _ in range(2))
    # The layout of a Linear: CPUs that emulate bf16 are ten times slower in other layouts.
    return _seconds(lambda: torch.nn.functional.linear(left, right), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    # The first run is slow: it loads kernels, and an idle device has a low clock.
    return median([_timed(run, device) for _ in range(_REPEATS + 1)][1:])


def _timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _measure_disk(folder: Path) -> float:
    # Random data: some file systems compress zeros and repetitions.
    block = os.urandom(_DISK_BLOCK)
    with tempfile.TemporaryFile(dir=folder, prefix=".diffsynth-speed-") as stream:
        for position in range(0, _DISK_BYTES, _DISK_BLOCK):
            stream.write(position.to_bytes(8, "little") + block[8:])
        stream.flush()
        os.fsync(stream.fileno())  # POSIX_FADV_DONTNEED drops clean pages only
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with ThreadPoolExecutor(_DISK_THREADS) as pool:
            count = sum(pool.map(lambda first: _read_lane(stream.fileno(), first), range(_DISK_THREADS)))
        return count / (time.perf_counter() - start)


def _read_lane(file: int, first: int) -> int:
    """Read every fourth 8 MiB block of the test file, starting with block number `first`; return the number of bytes
    read.
    """
    memory = [bytearray(_DISK_BLOCK)]
    starts = range(first * _DISK_BLOCK, _DISK_BYTES, _DISK_THREADS * _DISK_BLOCK)
    return sum(os.preadv(file, memory, start) for start in starts)
