"""The weights of one component in its files, read whole, layer by layer or key by key according to one plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.core import progress
from diffsynth.core.device.upload import UploadRing
from diffsynth.core.loader import convert
from diffsynth.core.loader.header import Header
from diffsynth.core.loader.reader.blocks import (
    BLOCK,
    THREADS,
    BlockReader,
    ByteBudget,
    FileMapping,
    ReadRequest,
    new_ring,
    run_tasks,
    torch_dtype,
    upload,
)
from diffsynth.core.loader.reader.ops import runs, strided
from diffsynth.errors import did_you_mean

Task = Callable[[], None]

_WORK = 256 * 2**20
"""Bytes of source tensors that all threads hold together while they convert them; a single larger target may exceed
it."""


class WeightSource(Protocol):
    """The interface of what reads the weights of one component by name: `ComponentSource`, and sources that change what
    another one reads. The members are those of `ComponentSource`.
    """

    where: str
    dtypes: dict[str, torch.dtype]

    @property
    def keys(self) -> tuple[str, ...]:
        """A tuple of the names of all tensors."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A dict name -> shape."""

    @property
    def files(self) -> tuple[Path, ...]:
        """A tuple of the `Path`s of the files that are read."""

    @property
    def streams(self) -> bool:
        """Whether reading some tensors takes memory for those only."""

    def size(self, keys: Iterable[str] | None = None) -> int:
        """Return the size in bytes of the tensors named in `keys` (None: all)."""

    def host_memory(self, device: torch.device | str, *, copy: bool) -> int:
        """Return the peak host memory, in bytes, to read all tensors onto `device`."""

    def read(
        self, keys: Iterable[str] | None = None, *, device: torch.device | str = "cpu", copy: bool = True
    ) -> dict[str, Tensor]:
        """Return a dict name -> tensor on `device` for `keys` (None: all)."""

    def fill(self, into: Mapping[str, Tensor]) -> None:
        """Read the tensors named in `into` into the existing tensors of `into`."""

    def read_ahead(self, *, limit: int, stop: Callable[[], bool]) -> None:
        """Read up to `limit` bytes of the files and drop them."""


class ComponentSource:
    """The weights of one component, by target key. It holds no open file and no tensor; threads may share it.

    Reading some of the keys gives the same bits as reading all of them.

    Args:
        header: the header of the files, or of tensors in memory.
        targets: target key -> how it is made, from `convert.plan`.
        dtypes: target key -> dtype to read it in.
        prefix: the prefix of every source key in the header.
        where: the files' names, for messages.
    """

    def __init__(
        self,
        header: Header,
        targets: Mapping[str, convert.Target],
        dtypes: Mapping[str, torch.dtype],
        *,
        prefix: str = "",
        where: str = "",
    ) -> None:
        self._header = header
        self._reader = BlockReader(header)
        self._targets = dict(targets)
        self._prefix = prefix
        self.dtypes = dict(dtypes)
        self.where = where or header.where

    @property
    def keys(self) -> tuple[str, ...]:
        """A tuple of all target keys (names of the component's tensors), in the order in which they were given."""
        return tuple(self._targets)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A dict target key (name of a tensor of the component) -> shape."""
        return {key: target.shape for key, target in self._targets.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """A tuple of the `Path`s of the files that are read; empty for tensors in memory."""
        return self._header.files

    @property
    def streams(self) -> bool:
        """Whether reading some tensors takes memory for those only: True for safetensors; False for pickles and state
        dicts.
        """
        return self._header.tensors_in_memory is None

    def targets_of(self, prefix: str) -> tuple[str, ...]:
        """Return a tuple of the target keys (tensor names) that start with `prefix`, such as `"layers.3."`."""
        return tuple(key for key in self._targets if key.startswith(prefix))

    def size(self, keys: Iterable[str] | None = None) -> int:
        """Return the total size in bytes of the tensors named in `keys` (None: all), in the dtypes that they are read
        in.
        """
        return sum(
            prod(self._targets[key].shape) * self.dtypes[key].itemsize for key in (self.keys if keys is None else keys)
        )

    def host_memory(self, device: torch.device | str, *, copy: bool) -> int:
        """Return the peak host memory, in bytes, to read all tensors onto `device`; mapped files do not count.

        Args:
            device: the destination.
            copy: as for `read`; mapped files do not count.
        """
        works = [self._work(target) for target in self._targets.values()]
        work = min(sum(works), max(_WORK, *works, 0))
        if torch.device(device).type != "cpu":
            return work + 2 * THREADS * BLOCK
        return work + self.size(key for key in self.keys if copy or self._range(key) is None)

    def read(
        self, keys: Iterable[str] | None = None, *, device: torch.device | str = "cpu", copy: bool = True
    ) -> dict[str, Tensor]:
        """Return a dict target key -> tensor on `device` for `keys` (None: all); on "meta" tensors have no data,
        nothing is read.

        Args:
            keys: target keys.
            device: the destination.
            copy: True gives each tensor memory of its own; only tensors of a state dict that need no change are shared
                with it. False, on the CPU, maps a tensor that is stored as it is wanted. Mapping has two side effects:
                overwriting the file in place changes the weights, and addresses are aligned as the file's offsets are,
                so that a matrix product may round otherwise. What is written to a mapped tensor stays private.

        Raises:
            KeyError: a key that is no target.
            CorruptFile: a file changed since its header was read, or cannot be read.
        """
        device = torch.device(device)
        wanted = self.keys if keys is None else tuple(map(self._known, keys))
        if device.type == "meta":
            return self._empty(wanted, device)
        made: dict[str, Tensor] = {}
        tasks: list[Task] = []
        if not copy or not self._header.files:
            made |= {key: self._shared(key, device) for key in wanted if self._is_in_memory(key)}
        if not copy and device.type == "cpu":
            mapped, tasks = self._mapped([key for key in wanted if key not in made and self._range(key) is not None])
            made |= mapped
        new = self._empty([key for key in wanted if key not in made], device)
        self._run(tasks, new)
        return {key: (made if key in made else new)[key] for key in wanted}

    def fill(self, into: Mapping[str, Tensor]) -> None:
        """Read the tensors named in `into` from the files into the existing tensors of `into`, converted to their
        dtypes.

        Args:
            into: target key -> tensor: contiguous, of the target's shape, of any dtype; all on one device.

        Raises:
            KeyError: a key that is no target.
            ValueError: a tensor of another shape, not contiguous, or on another device than the others.
            CorruptFile: a file changed since its header was read, or cannot be read.
        """
        for key, tensor in into.items():
            shape = self._targets[self._known(key)].shape
            if tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise ValueError(f"{key}: cannot fill {tuple(tensor.shape)}; expected {shape}, contiguous")
        if len(found := {str(tensor.device) for tensor in into.values()}) > 1:
            raise ValueError(f"the tensors to fill are on {' and '.join(sorted(found))}; fill one device at a time")
        self._run([], into)

    def read_ahead(self, *, limit: int, stop: Callable[[], bool]) -> None:
        """Read up to `limit` bytes of the files and drop them, to fill the system's page cache; end early if `stop()`
        is True.

        Args:
            limit: bytes.
            stop: called before each block; the method returns when it returns True.
        """
        sources = {self._prefix + source: None for target in self._targets.values() for source in target.sources}
        infos = [self._header.tensors[key] for key in sources]
        for file in dict.fromkeys(info.file for info in infos if info.file is not None):
            start = min(info.start for info in infos if info.file == file)
            end = min(max(info.end for info in infos if info.file == file), start + limit)
            limit -= max(end - start, 0)
            for first in range(start, end, BLOCK):
                if stop():
                    return
                self._reader.discard(file, first, min(first + BLOCK, end))

    def _known(self, key: str) -> str:
        if key not in self._targets:
            raise KeyError(f"{key!r} is not among the {len(self._targets)} targets{did_you_mean(key, self._targets)}")
        return key

    def _run(self, tasks: list[Task], into: Mapping[str, Tensor]) -> None:
        """Run `tasks` together with tasks that fill the tensors of `into`, and wait until all are done."""
        task = progress.current("load")
        on_device = next((t.device for t in into.values() if t.device.type != "cpu"), None)
        ring = new_ring(on_device) if on_device is not None else None
        budget = ByteBudget(_WORK)
        requests: list[ReadRequest] = []
        computed: list[Task] = []
        for key, tensor in into.items():
            found = self._requests(key, tensor.view(-1))
            if found is None:
                computed.append(functools.partial(self._make, key, tensor, ring, budget, task))
            else:
                requests += found
        # Computed targets take longest, so they start first.
        run_tasks([*computed, *tasks, *self._reader.tasks(requests, ring, task)])
        if ring is not None:
            ring.wait()

    def _make(
        self,
        key: str,
        into: Tensor,
        ring: UploadRing | None,
        budget: ByteBudget,
        task: progress.Task = progress.NO_TASK,
    ) -> None:
        """Compute the tensor `key` from all of its source tensors in memory, and copy it into the tensor `into`."""
        target = self._targets[key]
        with budget.of(self._work(target)), torch.no_grad():
            made = self._computed(target)
            if ring is None:
                into.copy_(made)
            else:
                upload(made.reshape(-1), into.view(-1), ring)
        task.advance(into.nbytes)

    def _requests(self, key: str, into: Tensor) -> list[ReadRequest] | None:
        """Return a list of the `ReadRequest`s that read a target from files straight into `into`; None if that is not
        possible.

        Sources of different dtypes count as computed, because joining them promotes the dtype.
        """
        target = self._targets[key]
        infos = [self._header.tensors[self._prefix + source] for source in target.sources]
        if any(info.file is None for info in infos) or len({info.dtype for info in infos}) != 1:
            return None
        if (found := runs(target, [info.shape for info in infos])) is None:
            return None
        stored = torch_dtype(self._prefix + target.sources[0], infos[0])
        requests, first = [], 0
        for run in found:
            info = infos[run.source]
            assert info.file is not None
            part = into[first : first + run.count]
            requests.append(ReadRequest(info.file, info.start + run.first * stored.itemsize, stored, part))
            first += run.count
        assert first == into.numel(), f"{target.rule} gives {first} elements for {key}, planned {target.shape}"
        return requests

    def _range(self, key: str) -> _FileRange | None:
        """Return the `_FileRange` (file, start, end) with exactly the bytes of a target in its wanted dtype; None if
        there is none.
        """
        target = self._targets[key]
        # Two names of one tensor get memory of their own, so that changing one does not change the other.
        if len(target.sources) != 1 or (isinstance(target.rule, convert.Tie) and target.index):
            return None
        info = self._header.tensors[self._prefix + target.sources[0]]
        found = runs(target, [info.shape])
        if info.file is None or found is None or len(found) != 1 or not found[0].count:
            return None
        dtype = torch_dtype(self._prefix + target.sources[0], info)
        start = info.start + found[0].first * dtype.itemsize
        if dtype != self.dtypes[key] or start % dtype.itemsize:
            return None
        return _FileRange(info.file, start, start + found[0].count * dtype.itemsize)

    def _mapped(self, keys: Iterable[str]) -> tuple[dict[str, Tensor], list[Task]]:
        """Return a tuple: a dict target key -> tensor that maps its file, and a list of functions that read the mapped
        pages.
        """
        task = progress.current("load")
        mappings: dict[Path, FileMapping] = {}
        ranges: dict[Path, list[tuple[int, int]]] = {}
        made: dict[str, Tensor] = {}
        for key in keys:
            found = self._range(key)
            assert found is not None
            if found.file not in mappings:
                mappings[found.file] = FileMapping(self._header, found.file)
            made[key] = mappings[found.file].tensor(found.start, self._targets[key].shape, self.dtypes[key])
            ranges.setdefault(found.file, []).append((found.start, found.end))
        steps = [
            (first, file, min(first + BLOCK, end))
            for file, starts_and_ends in ranges.items()
            for start, end in _joined(starts_and_ends)
            for first in range(start, end, BLOCK)
        ]
        return made, [
            functools.partial(self._populate, mappings[file], file, first, end, task)
            for first, file, end in sorted(steps, key=lambda step: step[0])
        ]

    def _populate(self, mapping: FileMapping, file: Path, start: int, end: int, task: progress.Task) -> None:
        if not mapping.populate(start, end):
            self._reader.discard(file, start, end)
        self._header.check_unchanged(file)
        task.advance(end - start)

    def _is_in_memory(self, key: str) -> bool:
        in_memory = self._header.tensors_in_memory or {}
        sources = self._targets[key].sources
        return bool(sources) and all(self._prefix + source in in_memory for source in sources)

    def _shared(self, key: str, device: torch.device) -> Tensor:
        return self._computed(self._targets[key]).to(device, self.dtypes[key]).contiguous()

    def _computed(self, target: convert.Target) -> Tensor:
        sources = tuple(self._reader.tensor(self._prefix + source) for source in target.sources)
        made = strided(target.rule, sources, target.index)
        assert tuple(made.shape) == target.shape, f"{target.rule} made {tuple(made.shape)}, planned {target.shape}"
        return made

    def _empty(self, keys: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        return {key: torch.empty(self._targets[key].shape, dtype=self.dtypes[key], device=device) for key in keys}

    def _work(self, target: convert.Target) -> int:
        """Return the bytes of source tensors in memory while a target is computed; 0 if it is read straight into its
        tensor.
        """
        infos = [self._header.tensors[self._prefix + source] for source in target.sources]
        alike = len({info.dtype for info in infos}) == 1
        if alike and runs(target, [info.shape for info in infos]) is not None:
            return 0
        return sum(info.end - info.start for info in infos)


@dataclass(frozen=True)
class _FileRange:
    """The bytes of one file from offset `start` to `end`."""

    file: Path
    start: int
    end: int


def read_tensors(header: Header, *, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a dict key -> tensor on `device` of all tensors of a header, floating ones in `dtype` (None: as stored);
    those of files are copies in memory of their own.

    Tensors of a state dict that need no change are shared with it.

    Args:
        device: the destination.
        dtype: dtype of the floating tensors; None keeps the file's.

    Raises:
        CorruptFile: a file changed since its header was read, or cannot be read.
    """
    plan = convert.plan((), header.shapes)
    dtypes = {key: stored_dtype(header, key) for key in plan.targets}
    if dtype is not None:
        dtypes = {key: dtype if stored.is_floating_point else stored for key, stored in dtypes.items()}
    return ComponentSource(header, plan.targets, dtypes).read(device=device, copy=True)


def stored_dtype(header: Header, key: str) -> torch.dtype:
    """Return the `torch.dtype` that a tensor has in its file or in memory; raise CorruptFile if torch has no such
    dtype.

    Raises:
        CorruptFile: torch has no such dtype.
    """
    in_memory = (header.tensors_in_memory or {}).get(key)
    return in_memory.dtype if in_memory is not None else torch_dtype(key, header.tensors[key])


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return a sorted list of (start, end) tuples: `ranges`, with those that touch or overlap joined into one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
