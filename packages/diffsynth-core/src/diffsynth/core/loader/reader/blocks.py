"""Reading and mapping the bytes of files: block reads on several threads, and private mappings."""

from __future__ import annotations

import ctypes
import functools
import mmap
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.core.device.upload import UploadRing
from diffsynth.core.loader.dtypes import torch_dtypes
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.progress import NO_TASK, Task
from diffsynth.errors import CorruptFile

BLOCK = 8 * 2**20
"""Bytes that a thread reads at once, and the size of an upload buffer."""

THREADS = 4
"""The number of threads at which reading stopped getting faster (docs/loading-speed.md)."""

PAGE = mmap.PAGESIZE
# Linux's number, which Python's `mmap` lacks; its own `madvise` would hold the interpreter's lock during the call, too.
_MADV_POPULATE_READ = 22

_ALIGNMENT = 64


@dataclass(frozen=True)
class ReadRequest:
    """Consecutive elements of a file, and the tensor that they are read into.

    Args:
        file: the file.
        start: offset of the first byte in the file.
        stored: dtype in the file.
        into: the destination: one axis, contiguous, of any dtype, in host memory or on the upload ring's device.
    """

    file: Path
    start: int
    stored: torch.dtype
    into: Tensor

    @property
    def end(self) -> int:
        """Offset in the file, in bytes, just behind the last byte of the request."""
        return self.start + self.into.numel() * self.stored.itemsize

    @property
    def room(self) -> int:
        """Bytes that the request takes in a buffer: its elements in the larger of its two dtypes, rounded up to a
        multiple of 64.
        """
        size = self.into.numel() * max(self.stored.itemsize, self.into.dtype.itemsize)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def cut(self) -> list[ReadRequest]:
        """Return a list of `ReadRequest`s of at most 8 MiB each that together read the same elements; empty for no
        elements.
        """
        count = BLOCK // max(self.stored.itemsize, self.into.dtype.itemsize)
        starts = range(0, self.into.numel(), count)
        return [
            ReadRequest(
                self.file, self.start + first * self.stored.itemsize, self.stored, self.into[first : first + count]
            )
            for first in starts
        ]


class BlockReader:
    """Reads the tensors that a header describes. A file is open only while a block of it is read.

    Args:
        header: names and offsets of the tensors, and the stamps of the files when the header was read.
    """

    def __init__(self, header: Header) -> None:
        self._header = header

    def tensor(self, key: str) -> Tensor:
        """Return the tensor of a key in its stored dtype: read into new memory, or sharing the memory of one in the
        header.

        Raises:
            CorruptFile: the file changed, cannot be read, or torch has no such dtype.
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

    def tasks(
        self, requests: Iterable[ReadRequest], ring: UploadRing | None, progress: Task = NO_TASK
    ) -> list[Callable[[], None]]:
        """Return a list of functions without arguments, one for each block of at most 8 MiB, that read it into its
        destinations.

        They may run in any order and in any thread.

        Blocks of different files alternate, so that all files are read at once; each file is read forward.

        Args:
            ring: the buffers that take the data to the ring's device; None if the destinations are in host memory.
            progress: advanced by the bytes of the destinations.
        """
        blocks = _blocks([part for request in requests for part in request.cut()])
        scratch: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        return [functools.partial(self._fill, block, ring, scratch, progress) for block in blocks]

    def discard(self, file: Path, start: int, end: int) -> None:
        """Read bytes `start` to `end` of a file and drop them, so that the system's page cache holds them."""
        scratch = torch.empty(min(end - start, BLOCK), dtype=torch.uint8)
        for first in range(start, end, BLOCK):
            self._read(file, first, [scratch[: end - first]])

    def _fill(
        self,
        block: Sequence[ReadRequest],
        ring: UploadRing | None,
        scratch: queue.SimpleQueue[Tensor],
        progress: Task,
    ) -> None:
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
        progress.advance(sum(request.into.nbytes for request in block))

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


class FileMapping:
    """A file mapped copy-on-write: tensors of it are writable, and what is written stays private to the process.

    The mapping lives as long as a tensor of it.

    Args:
        header: holds the file's stamp.
        file: the file to map.

    Raises:
        CorruptFile: the file was replaced or changed since the header was read.
    """

    def __init__(self, header: Header, file: Path) -> None:
        with file.open("rb") as stream:
            header.check_unchanged(file, stream.fileno())
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self._start = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this shape and dtype that maps the file from byte `start` on; nothing is copied."""
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def populate(self, start: int, end: int) -> bool:
        """Read bytes `start` to `end` of the mapped file into memory, and return a bool: whether the system could do
        that.
        """
        first = start // PAGE * PAGE
        call = _madvise()
        return call is not None and call(self._start + first, end - first, _MADV_POPULATE_READ) == 0


def upload(source: Tensor, destination: Tensor, ring: UploadRing) -> None:
    """Copy a host tensor into `destination` on the ring's device, block by block, its dtype converted on the host.

    Args:
        source: one axis, contiguous, in host memory.
        destination: one axis, contiguous, on the ring's device.
    """
    count = BLOCK // destination.dtype.itemsize
    for first in range(0, destination.numel(), count):
        into = destination[first : first + count]
        with ring.buffer() as buffer:
            final = buffer[: into.numel() * into.dtype.itemsize].view(into.dtype)
            final.copy_(source[first : first + count])
            ring.upload([(final, into)])


def new_ring(device: torch.device) -> UploadRing:
    """Return an `UploadRing` to `device` with two buffers of 8 MiB for each of the four reading threads.

    One is filled while the other is uploaded.
    """
    return UploadRing(device, buffers=2 * THREADS, size=BLOCK)


def torch_dtype(key: str, info: TensorInfo) -> torch.dtype:
    """Return the `torch.dtype` of a tensor that a header describes; raise CorruptFile if torch has no such dtype.

    Args:
        key: the tensor's key, for the message.

    Raises:
        CorruptFile: torch has no such dtype.
    """
    known = torch_dtypes()
    if info.dtype not in known:
        raise CorruptFile(
            f"{info.file}: tensor {key!r} of shape {info.shape} has dtype {info.dtype!r}, which torch has no "
            f"counterpart of; expected one of {', '.join(known)}"
        )
    return known[info.dtype]


def run_tasks(tasks: Sequence[Callable[[], None]], threads: int = THREADS) -> None:
    """Call the tasks (functions without arguments) on up to `threads` threads, started in order, and wait until all are
    done; after an exception start no more, and raise it.

    A single task, or one thread, runs in the calling thread.

    Args:
        threads: how many tasks run at the same time.

    Raises:
        BaseException: the first exception of a task, or the one that interrupted the wait; no further task starts.
    """
    threads = min(threads, len(tasks))
    if threads < 2:
        for task in tasks:
            task()
        return
    remaining, lock, stop = iter(tasks), threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                task = next(remaining, None)
            if task is None:
                return
            try:
                task()
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads, thread_name_prefix="diffsynth-read") as pool:
        try:
            workers = [pool.submit(work) for _ in range(threads)]
            for worker in workers:
                worker.result()
        finally:
            stop.set()


class ByteBudget:
    """A limit on the bytes that threads hold together. A larger request is granted while no other thread holds any.

    Args:
        size: the limit in bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Context manager that holds `size` bytes of the limit; it waits until so many are free, or until no thread
        holds any.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._size)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


def _blocks(requests: list[ReadRequest]) -> list[list[ReadRequest]]:
    """Return a list of blocks, each a list of requests without gaps between them in a file, which need at most 8 MiB
    together.

    Blocks of different files alternate, so that all files are read at once.
    """
    blocks: list[list[ReadRequest]] = []
    size = 0
    for request in sorted(requests, key=lambda request: (request.file, request.start)):
        last = blocks[-1] if blocks else []
        joins = last and last[-1].file == request.file and last[-1].end == request.start
        room = request.room
        if joins and size + room <= BLOCK:
            last.append(request)
            size += room
        else:
            blocks.append([request])
            size = room
    counts: dict[Path, int] = {}
    rounds = []
    for block in blocks:
        counts[block[0].file] = counts.get(block[0].file, -1) + 1
        rounds.append(counts[block[0].file])
    return [block for _, block in sorted(zip(rounds, blocks, strict=True), key=lambda pair: pair[0])]


@contextmanager
def _borrowed(scratch: queue.SimpleQueue[Tensor]) -> Iterator[Tensor]:
    """Context manager that yields a uint8 host tensor of 8 MiB, taken from `scratch` or new, and puts it into `scratch`
    at the end.

    Memory is used again because an allocator that keeps freed blocks would in the end hold as much as the file.
    """
    try:
        memory = scratch.get_nowait()
    except queue.Empty:
        memory = torch.empty(BLOCK, dtype=torch.uint8)
    try:
        yield memory
    finally:
        scratch.put(memory)


def _cut(buffer: Tensor, block: Sequence[ReadRequest], *, stored: bool = False) -> list[Tensor]:
    """Return a list of views of `buffer`, one for each request, with its number of elements in its stored or its final
    dtype.
    """
    parts, first = [], 0
    for request in block:
        dtype = request.stored if stored else request.into.dtype
        parts.append(buffer[first : first + request.into.numel() * dtype.itemsize].view(dtype))
        first += request.room
    return parts


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        call = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call
