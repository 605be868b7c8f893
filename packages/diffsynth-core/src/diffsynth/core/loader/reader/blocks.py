"""Runs of elements from files into tensors, in blocks: one read each, whatever number of tensors it covers."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.core.device.upload import UploadRing
from diffsynth.core.loader.dtypes import torch_dtypes
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.reader.workers import THREADS
from diffsynth.errors import CorruptFile

BLOCK = 8 * 2**20
"""Bytes that a thread reads at once, and the size of an upload buffer."""

_ALIGNMENT = 64


@dataclass(frozen=True)
class ReadRequest:
    """A run of elements in a file, and the tensor that it fills.

    Args:
        file: where it is.
        start: its first byte there.
        stored: dtype in the file.
        into: one axis, contiguous, of any dtype, in host memory or on the ring's device.
    """

    file: Path
    start: int
    stored: torch.dtype
    into: Tensor

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.start + self.into.numel() * self.stored.itemsize

    @property
    def room(self) -> int:
        """Bytes that it takes in a buffer."""
        size = self.into.numel() * max(self.stored.itemsize, self.into.dtype.itemsize)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def cut(self) -> list[ReadRequest]:
        """The same in pieces that fit a block; none of an empty one."""
        count = BLOCK // max(self.stored.itemsize, self.into.dtype.itemsize)
        starts = range(0, self.into.numel(), count)
        return [
            ReadRequest(
                self.file, self.start + first * self.stored.itemsize, self.stored, self.into[first : first + count]
            )
            for first in starts
        ]


class BlockReader:
    """Reads what a header points to. Files are open while a block is read, so never more than there are threads.

    Args:
        header: names, places, and what the files were when it was read.
    """

    def __init__(self, header: Header) -> None:
        self._header = header

    def tensor(self, key: str) -> Tensor:
        """One tensor as stored: the caller's or a pickle's own, or new memory.

        Raises:
            CorruptFile: the file changed, cannot be read, or the dtype has no counterpart in torch.
        """
        in_memory = (self._header.tensors_in_memory or {}).get(key)
        if in_memory is not None:
            return in_memory.detach()
        info = self._header.tensors[key]
        tensor = torch.empty(info.shape, dtype=torch_dtype(key, info))
        assert info.file is not None
        if tensor.numel():
            self._read(info.file, info.start, [tensor.view(-1)])
        return tensor

    def tasks(self, requests: Iterable[ReadRequest], ring: UploadRing | None) -> list[Callable[[], None]]:
        """Reads that fill the pieces, to be run in any order. They take turns among files, and go forward in each.

        Args:
            ring: takes them to its device; None where they are filled in place.
        """
        blocks = _blocks([part for request in requests for part in request.cut()])
        scratch: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        return [functools.partial(self._fill, block, ring, scratch) for block in blocks]

    def discard(self, file: Path, start: int, end: int) -> None:
        """Read a range for the system's cache alone."""
        scratch = torch.empty(min(end - start, BLOCK), dtype=torch.uint8)
        for first in range(start, end, BLOCK):
            self._read(file, first, [scratch[: end - first]])

    def _fill(self, block: Sequence[ReadRequest], ring: UploadRing | None, scratch: queue.SimpleQueue[Tensor]) -> None:
        with _borrowed(scratch) as stored, ring.buffer() if ring is not None else nullcontext() as buffer:
            finals = [request.into for request in block] if buffer is None else _cut(buffer, block)
            landings = [
                final if request.stored == final.dtype else part
                for request, final, part in zip(block, finals, _cut(stored, block, stored=True), strict=True)
            ]
            self._read(block[0].file, block[0].start, landings)
            for landing, final in zip(landings, finals, strict=True):
                if landing is not final:
                    final.copy_(landing)
            if ring is not None:
                ring.upload([(final, request.into) for final, request in zip(finals, block, strict=True)])

    def _read(self, file: Path, start: int, landings: Sequence[Tensor]) -> None:
        try:
            with file.open("rb", buffering=0) as stream:
                self._header.check_unchanged(file, stream.fileno())
                stream.seek(start)
                for landing in landings:
                    left = memoryview(landing.view(torch.uint8).numpy())
                    while left:
                        count = stream.readinto(left)
                        if not count:
                            raise CorruptFile(f"{file} ends in the middle of a tensor. Fetch it again.")
                        left = left[count:]
                self._header.check_unchanged(file, stream.fileno())
        except OSError as error:
            raise CorruptFile(f"{file} cannot be read at byte {start}: {error}") from error


def upload(source: Tensor, destination: Tensor, ring: UploadRing) -> None:
    """A host tensor to one on the ring's device, converted on the way; both of one axis and contiguous."""
    count = BLOCK // destination.dtype.itemsize
    for first in range(0, destination.numel(), count):
        into = destination[first : first + count]
        with ring.buffer() as buffer:
            final = buffer[: into.numel() * into.dtype.itemsize].view(into.dtype)
            final.copy_(source[first : first + count])
            ring.upload([(final, into)])


def new_ring(device: torch.device) -> UploadRing:
    """Two buffers a thread: one to fill, one in flight."""
    return UploadRing(device, buffers=2 * THREADS, size=BLOCK)


def torch_dtype(key: str, info: TensorInfo) -> torch.dtype:
    """torch's word for a dtype of a header.

    Raises:
        CorruptFile: it has none.
    """
    known = torch_dtypes()
    if info.dtype not in known:
        raise CorruptFile(
            f"{info.file}: tensor {key!r} of shape {info.shape} has dtype {info.dtype!r}, which torch has no "
            f"counterpart of; expected one of {', '.join(known)}"
        )
    return known[info.dtype]


def _blocks(requests: list[ReadRequest]) -> list[list[ReadRequest]]:
    """Neighbours in a file together, up to a block; ordered so that all files are read at once."""
    blocks: list[list[ReadRequest]] = []
    for request in sorted(requests, key=lambda request: (request.file, request.start)):
        last = blocks[-1] if blocks else []
        joins = last and last[-1].file == request.file and last[-1].end == request.start
        if joins and sum(part.room for part in last) + request.room <= BLOCK:
            last.append(request)
        else:
            blocks.append([request])
    turns: dict[Path, int] = {}
    turn = []
    for block in blocks:
        turns[block[0].file] = turns.get(block[0].file, -1) + 1
        turn.append(turns[block[0].file])
    return [block for _, block in sorted(zip(turn, blocks, strict=True), key=lambda pair: pair[0])]


@contextmanager
def _borrowed(scratch: queue.SimpleQueue[Tensor]) -> Iterator[Tensor]:
    """Memory for a block as it is stored, used again: an allocator that keeps what was freed would hold the file."""
    try:
        memory = scratch.get_nowait()
    except queue.Empty:
        memory = torch.empty(BLOCK, dtype=torch.uint8)
    try:
        yield memory
    finally:
        scratch.put(memory)


def _cut(buffer: Tensor, block: Sequence[ReadRequest], *, stored: bool = False) -> list[Tensor]:
    """A part of the buffer for each piece, of the dtype that it has in the file or will have."""
    parts, first = [], 0
    for request in block:
        dtype = request.stored if stored else request.into.dtype
        parts.append(buffer[first : first + request.into.numel() * dtype.itemsize].view(dtype))
        first += request.room
    return parts
