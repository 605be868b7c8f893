"""Host memory for weights: huge pages where we fill it, private mappings where the file can stand for itself."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.core.loader.header import Header

PAGE = mmap.PAGESIZE
_HUGE_FROM = 4 * 2**20
# Linux's numbers; Python's `mmap` knows the first alone, and holds the interpreter's lock meanwhile.
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Unfilled host memory, on huge pages where the system has them: the first touch of small ones costs more than a
    copy of their content.
    """
    tensor = torch.empty(shape, dtype=dtype)
    size = tensor.numel() * tensor.element_size()
    if size >= _HUGE_FROM:
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        _advise(start, (tensor.data_ptr() + size - start) // PAGE * PAGE, _MADV_HUGEPAGE)
    return tensor


class Mapping:
    """A file in memory, copy-on-write: the tensors of it are writable, and what is written stays private.

    Tensors keep it alive; it goes with the last of them.

    Args:
        header: knows what the file was when it was looked at.
        file: to map.

    Raises:
        CorruptFile: it is another file by now.
    """

    def __init__(self, header: Header, file: Path) -> None:
        with file.open("rb") as stream:
            header.check_unchanged(file, stream.fileno())
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self._start = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor whose first byte in the file is `start`."""
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def populate(self, start: int, end: int) -> bool:
        """Have the bytes of a range in memory; False where the system cannot."""
        first = start // PAGE * PAGE
        return _advise(self._start + first, end - first, _MADV_POPULATE_READ)


def _advise(address: int, size: int, advice: int) -> bool:
    call = _madvise()
    return size > 0 and call is not None and call(address, size, advice) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        call = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call
