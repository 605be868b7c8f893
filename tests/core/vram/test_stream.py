"""The schedule on a device with streams, on a stand-in whose copies happen no sooner than somebody waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.vram.networks import tower
from tests.core.vram.sources import emptied, on_disk
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth.core.device import Timestamp
from diffsynth.core.vram import masters, stream
from diffsynth.core.vram.managed import ManagedModule, wrap
from diffsynth.core.vram.masters import HostArena
from diffsynth.core.vram.placement import Policy

CPU = torch.device("cpu")
ONE_AT_A_TIME = threading.RLock()
TOKENS = torch.arange(12).view(2, 6)


@dataclass
class Event:
    name: str
    work: list[Any]
    log: list[str]

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")
        with ONE_AT_A_TIME:
            while self.work:
                function, args, kwargs = self.work.pop(0)
                function(*args, **kwargs)


class Deferring(TorchDispatchMode):
    """Keeps copies for later, as a stream does."""

    def __init__(self, work: list[Any]) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.work.append((function, args, kwargs or {}))
            return args[0]
        return function(*args, **(kwargs or {}))


@dataclass
class LateStream:
    """A side stream that does nothing until it must; `log` tells in which order it was given what."""

    log: list[str] = field(default_factory=list)
    work: list[Any] = field(default_factory=list)
    overlaps = True

    @contextmanager
    def run(self) -> Iterator[None]:
        self.log.append("copy")
        with Deferring(self.work):
            yield

    def mark(self) -> Event:
        return Event("copy", self.work, self.log)

    def timestamp(self) -> Timestamp:
        return Timestamp()

    def wait(self, event: Event | None) -> None:
        self.log.append(f"after {event.name}" if event is not None else "after nothing")


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> LateStream:
    """The CPU, taken for a device with streams and page-locked memory."""
    late = LateStream()
    monkeypatch.setattr(stream.devices, "side_stream", lambda device: late)
    monkeypatch.setattr(stream.devices, "mark", lambda device: Event("use", [], late.log))
    monkeypatch.setattr(stream.devices, "wait_for", lambda event, device: event and event.synchronize())
    monkeypatch.setattr(stream.devices, "timestamp", lambda device: Timestamp())
    monkeypatch.setattr(masters, "host_memory", lambda size, device, lock=True: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(stream, "host_memory", masters.host_memory)
    return late


def streamed(folder: Path, slots: int) -> tuple[torch.nn.Module, ManagedModule]:
    module = tower()
    source = on_disk(module, folder)
    wrapped = wrap(emptied(module), Policy.preset("disk", "cpu"), source=source, smallest=0)
    wrapped.configure(resident=("layers.2",), slots=slots)
    return module, wrapped


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("locked", [True, False])
def test_every_use_waits_for_its_copy(
    slots: int, locked: bool, side: LateStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked masters are copied by the device alone; others pass two staging buffers, filled by a thread."""
    if locked:
        monkeypatch.setattr(stream, "_is_locked", lambda master: True)
        monkeypatch.setattr(stream.BlockStream, "_upload", _from_disk(stream.BlockStream._upload))
    expected = tower()(TOKENS)
    module, wrapped = streamed(tmp_path, slots)
    with wrapped:
        for _ in range(3):
            assert torch.equal(module(TOKENS), expected)
    copies = [index for index, what in enumerate(side.log) if what == "copy"]
    assert len(copies) >= 3 * 6
    assert all(side.log[index - 1] == "after use" for index in copies), "a slot is overwritten after its last use"


def _from_disk(upload: Any) -> Any:
    """The masters of these tests are on disk; a locked one is in memory."""

    def call(self: Any, slot: Any, memory: Any, size: int) -> None:
        if memory is None:
            memory = torch.zeros(size, dtype=torch.uint8)
            self._masters[slot.block].fill(memory)
        upload(self, slot, memory, size)

    return call


def test_the_next_block_sets_out_before_the_current_one_is_done(side: LateStream, tmp_path: Path) -> None:
    module, wrapped = streamed(tmp_path, slots=2)
    seen: list[int] = []
    with wrapped:
        module(TOKENS)
        module.layers[4].up.register_forward_pre_hook(lambda *_: seen.append(side.log.count("copy")))
        module.layers[5].up.register_forward_pre_hook(lambda *_: seen.append(side.log.count("copy")))
        module(TOKENS)
        wrapped._stream._thread.submit(int).result()
    assert seen[1] > seen[0]
    assert wrapped.report.settle().misses == 0


@pytest.mark.parametrize("sizes", [[700] * 40, [1], [0, 5, 0], [2**20, 3, 2**20 + 1, 17], list(range(1, 200))])
def test_an_arena_gives_every_block_memory_of_its_own(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slabs: list[int] = []

    def slab(size: int, device: torch.device, lock: bool = True) -> torch.Tensor:
        slabs.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(masters, "host_memory", slab)
    arena = HostArena(sizes, torch.device("meta"))
    taken = [arena.take(size) for size in sizes]
    for number, memory in enumerate(taken):
        memory.fill_(number % 251)
    assert [memory.numel() for memory in taken] == sizes
    assert all(bool((memory == number % 251).all()) for number, memory in enumerate(taken))
    assert all(size & (size - 1) == 0 for size in slabs)
    if len(sizes) > 4:
        assert sum(slabs) < 1.3 * sum(sizes)
