"""Private mappings of files, for weights that can stay in them."""

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
# Linux's number, which Python's `mmap` does not know; its `madvise` would hold the interpreter's lock meanwhile, too.
_MADV_POPULATE_READ = 22


class FileMapping:
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
        call = _madvise()
        return call is not None and call(self._start + first, end - first, _MADV_POPULATE_READ) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        call = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call
