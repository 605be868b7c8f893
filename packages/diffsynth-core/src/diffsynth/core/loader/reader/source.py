"""A component on disk, ready to be read whole, layer by layer or key by key, always by the plan of its file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.core.device.upload import UploadRing
from diffsynth.core.loader import convert
from diffsynth.core.loader.header import Header
from diffsynth.core.loader.reader.blocks import BLOCK, BlockReader, ReadRequest, new_ring, torch_dtype, upload
from diffsynth.core.loader.reader.mapping import FileMapping
from diffsynth.core.loader.reader.ops import ElementRun, runs, strided
from diffsynth.core.loader.reader.workers import THREADS, ByteBudget, work_through
from diffsynth.errors import did_you_mean

Task = Callable[[], None]

_WORK = 256 * 2**20
"""Bytes of sources that threads hold together while they rearrange them; one larger target alone may take more."""


class ComponentSource:
    """The weights of one component, by target key. Holds no file open and no tensor; threads may share it.

    What `read` gives for a part of the keys is bit for bit what it gives for all of them.

    Args:
        header: of the files, or of tensors in memory.
        targets: how each key is made; from `convert.plan`.
        dtypes: of each key.
        prefix: stands before every source key.
        where: the files, for a message.
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
        """Every target key, in the module's order."""
        return tuple(self._targets)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Target key -> shape."""
        return {key: target.shape for key, target in self._targets.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from; empty for tensors in memory."""
        return self._header.files

    @property
    def streams(self) -> bool:
        """Whether a part of it costs the memory of that part alone: so it is with safetensors files."""
        return self._header.tensors_in_memory is None

    def targets_of(self, prefix: str) -> tuple[str, ...]:
        """The target keys under a module's name, `"layers.3."`."""
        return tuple(key for key in self._targets if key.startswith(prefix))

    def size(self, keys: Iterable[str] | None = None) -> int:
        """Bytes of these targets (None: all), as they are when read."""
        return sum(
            prod(self._targets[key].shape) * self.dtypes[key].itemsize for key in (self.keys if keys is None else keys)
        )

    def host_memory(self, device: torch.device | str, *, copy: bool) -> int:
        """Bytes of host memory that reading everything to a device takes at its peak; mapped files take none."""
        works = [self._work(target) for target in self._targets.values()]
        work = min(sum(works), max(_WORK, *works, 0))
        if torch.device(device).type != "cpu":
            return work + 2 * THREADS * BLOCK
        return work + self.size(key for key in self.keys if copy or not self._stands_as_it_is(key))

    def read(
        self, keys: Iterable[str] | None = None, *, device: torch.device | str = "cpu", copy: bool = True
    ) -> dict[str, Tensor]:
        """Tensors of these targets (None: all) on a device; on "meta" nothing is read.

        Args:
            copy: True gives each memory of its own; only tensors of a state dict that need no change are shared with
                it. False, on the CPU, maps what is in a file as it is wanted, at the price of two surprises: who
                overwrites the file in place changes the weights, and addresses are as odd as the file's offsets, so
                that a matrix product may round otherwise. What is written to a mapped tensor stays private.

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
            mapped, tasks = self._mapped([key for key in wanted if key not in made and self._stands_as_it_is(key)])
            made |= mapped
        new = self._empty([key for key in wanted if key not in made], device)
        self._run(tasks, new)
        return {key: (made if key in made else new)[key] for key in wanted}

    def fill(self, into: Mapping[str, Tensor]) -> None:
        """Read into tensors that are there: contiguous, of the target's shape, of any dtype, all on one device.

        Raises:
            KeyError: a key that is no target.
            ValueError: a tensor that is not as above.
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
        """Have the system cache the first `limit` bytes of the files; returns early when `stop()` says so."""
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
        """The tasks, and those that fill `into`."""
        on_device = next((t.device for t in into.values() if t.device.type != "cpu"), None)
        ring = new_ring(on_device) if on_device is not None else None
        budget = ByteBudget(_WORK)
        requests: list[ReadRequest] = []
        whole: list[Task] = []
        for key, tensor in into.items():
            found = self._requests(key, tensor.view(-1))
            if found is None:
                whole.append(functools.partial(self._make, key, tensor, ring, budget))
            else:
                requests += found
        # What is rearranged takes longest, so it begins first.
        work_through([*whole, *tasks, *self._reader.tasks(requests, ring)])
        if ring is not None:
            ring.wait()

    def _make(self, key: str, into: Tensor, ring: UploadRing | None, budget: ByteBudget) -> None:
        """One target, all of its sources at once."""
        target = self._targets[key]
        with budget.of(self._work(target)), torch.no_grad():
            made = self._computed(target)
            if ring is None:
                into.copy_(made)
            else:
                upload(made.reshape(-1), into.view(-1), ring)

    def _requests(self, key: str, into: Tensor) -> list[ReadRequest] | None:
        """Where the elements of a target lie one after the other; None if they have to be computed, or are no file's.

        Sources of unlike dtypes count as computed: joining them promotes.
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

    def _stands_as_it_is(self, key: str) -> bool:
        """Whether a target is one stretch of a file, of its own dtype."""
        return self._stretch(key) is not None

    def _stretch(self, key: str) -> _Stretch | None:
        target = self._targets[key]
        # Two names of one tensor get memory of their own: whoever changes one does not change the other.
        if len(target.sources) != 1 or (isinstance(target.rule, convert.Tie) and target.index):
            return None
        info = self._header.tensors[self._prefix + target.sources[0]]
        found = runs(target, [info.shape])
        if info.file is None or found is None or len(found) != 1 or not found[0].count:
            return None
        dtype = torch_dtype(self._prefix + target.sources[0], info)
        stretch = _Stretch.of(found[0], info.file, info.start, dtype)
        return stretch if dtype == self.dtypes[key] and stretch.start % dtype.itemsize == 0 else None

    def _mapped(self, keys: Iterable[str]) -> tuple[dict[str, Tensor], list[Task]]:
        """Tensors that are the files, and the tasks that bring their pages to memory."""
        mappings: dict[Path, FileMapping] = {}
        ranges: dict[Path, list[tuple[int, int]]] = {}
        made: dict[str, Tensor] = {}
        for key in keys:
            stretch = self._stretch(key)
            assert stretch is not None
            if stretch.file not in mappings:
                mappings[stretch.file] = FileMapping(self._header, stretch.file)
            made[key] = mappings[stretch.file].tensor(stretch.start, self._targets[key].shape, self.dtypes[key])
            ranges.setdefault(stretch.file, []).append((stretch.start, stretch.end))
        steps = [
            (first, file, min(first + BLOCK, end))
            for file, found in ranges.items()
            for start, end in _joined(found)
            for first in range(start, end, BLOCK)
        ]
        return made, [
            functools.partial(self._populate, mappings[file], file, first, end)
            for first, file, end in sorted(steps, key=lambda step: step[0])
        ]

    def _populate(self, mapping: FileMapping, file: Path, start: int, end: int) -> None:
        if not mapping.populate(start, end):
            self._reader.discard(file, start, end)
        self._header.check_unchanged(file)

    def _is_in_memory(self, key: str) -> bool:
        held = self._header.tensors_in_memory or {}
        sources = self._targets[key].sources
        return bool(sources) and all(self._prefix + source in held for source in sources)

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
        """Bytes of sources held while a target is made; none where it is put together in place."""
        infos = [self._header.tensors[self._prefix + source] for source in target.sources]
        alike = len({info.dtype for info in infos}) == 1
        if alike and runs(target, [info.shape for info in infos]) is not None:
            return 0
        return sum(info.end - info.start for info in infos)


@dataclass(frozen=True)
class _Stretch:
    """Bytes of one file that are a tensor."""

    file: Path
    start: int
    end: int

    @classmethod
    def of(cls, run: ElementRun, file: Path, start: int, dtype: torch.dtype) -> _Stretch:
        first = start + run.first * dtype.itemsize
        return cls(file, first, first + run.count * dtype.itemsize)


def read_tensors(header: Header, *, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a header under its own name, in memory of its own.

    Args:
        dtype: of floating tensors; None keeps the file's.

    Raises:
        CorruptFile: a file changed since its header was read, or cannot be read.
    """
    plan = convert.plan((), header.shapes)
    dtypes = {key: stored_dtype(header, key) for key in plan.targets}
    if dtype is not None:
        dtypes = {key: dtype if stored.is_floating_point else stored for key, stored in dtypes.items()}
    return ComponentSource(header, plan.targets, dtypes).read(device=device, copy=True)


def stored_dtype(header: Header, key: str) -> torch.dtype:
    """As in the file, told by the header."""
    in_memory = (header.tensors_in_memory or {}).get(key)
    return in_memory.dtype if in_memory is not None else torch_dtype(key, header.tensors[key])


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch or overlap as one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
