"""Blocks that come to the device ahead of their turn, in a ring of slots, while earlier ones compute."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsynth.core import device as devices
from diffsynth.core.vram.block_weights import BlockWeights, host_memory, is_pinned
from diffsynth.core.vram.report import TransferReport


@dataclass
class _Slot:
    """Device memory for one block.

    Args:
        memory: bytes.
        block: whose weights are in it or on their way.
        arriving: the thread's part of the way, if one works on it.
        ready: event behind the copy.
        times: when the copy began and ended, by the device's clock.
        used: event behind the last computation that read it.
    """

    memory: Tensor
    block: str | None = None
    arriving: Future[Any] | None = None
    ready: Any = None
    times: tuple[devices.Timestamp, devices.Timestamp] | None = None
    used: Any = None


@dataclass
class _Staging:
    """Pinned memory between disk or ordinary memory and the device; `copied` is the event behind its last use."""

    memory: Tensor
    copied: Any = None


class BlockOrder:
    """The order in which blocks run, learnt: whoever followed a block last time follows it next time.

    A round is a step of a loop; how often a block ran in the last one is how often it is expected to in this.

    Args:
        names: the order to begin with.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._next = dict(zip(names, [*names[1:], *names[:1]], strict=True))
        self._first = next(iter(names), None)
        self._last: str | None = None
        self._runs: Counter[str] = Counter()
        self._runs_before: Counter[str] = Counter()

    def begin_round(self, *, forgets: bool) -> None:
        """From now on runs are counted anew; nothing is known of a round before if it `forgets`."""
        self._runs_before, self._runs = Counter() if forgets else self._runs, Counter()

    def runs_before(self, name: str) -> int:
        """How often a block ran in the round before this."""
        return self._runs_before[name]

    def begin(self) -> None:
        """A stage begins: who runs next is first."""
        self._last = None

    def saw(self, name: str) -> None:
        """A block has its turn."""
        self._runs[name] += 1
        if self._last is None:
            self._first = name
        else:
            self._next[self._last] = name
        self._last = name

    def after(self, name: str | None) -> Iterator[str]:
        """Those expected after a block, or from the first on after None, each once."""
        seen = {name}
        following = self._first if name is None else self._next[name]
        while following is not None and following not in seen:
            yield following
            seen.add(following)
            following = self._next[following]


class BlockStream:
    """Gives each block its memory on the device when its turn comes, and has the next ones on their way by then.

    A wrong guess of the order costs time, never a wrong weight.

    Pinned masters are copied by the device alone, on a stream of its own. Others, those on disk among them, go
    through two staging buffers, by a thread. On the CPU the thread reads into the slot itself.

    Args:
        masters: of the blocks that take turns, by name.
        device: where they go.
        slots: blocks on the device at once, at least 1; with 1 nothing is hidden.
        order: who is expected after whom; the caller tells it who has a turn.
        report: counts what happens.
    """

    def __init__(
        self,
        block_weights: Mapping[str, BlockWeights],
        device: torch.device,
        *,
        slots: int,
        order: BlockOrder,
        report: TransferReport,
    ) -> None:
        largest = max((weights.packing.stored_bytes for weights in block_weights.values()), default=0)
        self._block_weights = dict(block_weights)
        self._device = device
        self._report = report
        self._order = order
        self._in_use: _Slot | None = None
        self._over: set[str] = set()
        self._side = devices.side_stream(device)
        memories = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(slots, len(block_weights)))
        ]
        # The allocator may give out memory that earlier work of the computing stream still reads.
        self._slots = [_Slot(memory, used=devices.record_event(device)) for memory in memories]
        self._on_host = device.type == "cpu" and not self._side.overlaps
        staged = not self._on_host and any(not is_pinned(weights) for weights in block_weights.values())
        self._staging = [_Staging(host_memory(largest, device)) for _ in range(2 if staged else 0)]
        needs_thread = staged or (self._on_host and bool(block_weights))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffsynth-vram") if needs_thread else None
        self._look_ahead(None)

    @property
    def device_bytes(self) -> int:
        """Bytes that the slots take on the device."""
        return sum(slot.memory.numel() for slot in self._slots)

    def acquire(self, name: str) -> Tensor:
        """The packed weights of a block, on the device, until `release`; the next blocks set out."""
        slot = self._slot_of(name)
        hit = slot is not None
        if slot is None:
            slot = self._free_slot(())
            assert slot is not None, "one block at a time"
            self._begin(slot, name)
        started = time.perf_counter()
        if slot.arriving is not None:
            try:
                slot.arriving.result()
            except BaseException:
                slot.block = None
                raise
        if slot.times is not None:
            self._report.timed(*slot.times, devices.timestamp(self._device))
            slot.times = None
        devices.wait_event(slot.ready, self._device)
        self._report.waited(time.perf_counter() - started, hit=hit)
        self._in_use = slot
        self._look_ahead(name)
        return slot.memory

    def release(self, name: str) -> None:
        """The block has been given to the device; its slot is free once that is done."""
        slot = self._in_use
        assert slot is not None, f"{name} is released, but nothing is in use"
        assert slot.block == name, f"{name} is released, but it is {slot.block}'s turn"
        slot.used = devices.record_event(self._device)
        self._in_use = None
        if len(self._slots) > 1:
            self._look_ahead(name)

    def finish(self, name: str) -> None:
        """A block is not expected to have another turn; if it has one after all, it comes then."""
        self._over.add(name)

    def close(self) -> None:
        """Let go of threads, staging and slots; whatever is still on its way arrives first."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        # The slots' memory goes back to an allocator that knows nothing of the side stream.
        devices.wait_event(self._side.record_event(), self._device)
        for staging in self._staging:
            if staging.copied is not None:
                staging.copied.synchronize()
        self._slots, self._staging, self._in_use = [], [], None

    def _look_ahead(self, name: str | None) -> None:
        """Have the blocks after this one set out, as many as there is room for."""
        room = len(self._slots) - (self._in_use is not None)
        expected = (each for each in self._order.after(name) if each in self._block_weights and each not in self._over)
        coming = tuple(itertools.islice(expected, room))
        for following in coming:
            if self._slot_of(following) is None:
                slot = self._free_slot(coming if name is None else (name, *coming))
                if slot is None:
                    return
                self._begin(slot, following)

    def _slot_of(self, name: str) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == name), None)

    def _free_slot(self, wanted: Collection[str]) -> _Slot | None:
        """A slot whose block is not wanted, an empty one first; None if there is none."""
        free = [slot for slot in self._slots if slot is not self._in_use and slot.block not in wanted]
        return min(free, key=lambda slot: slot.block is not None, default=None)

    def _begin(self, slot: _Slot, name: str) -> None:
        if slot.arriving is not None and not slot.arriving.cancel():
            # A wrong guess that the thread is still at would come after, and over, what is copied without it. If it
            # failed, whoever wants that block hears of it.
            slot.arriving.exception()
        slot.block = name
        weights = self._block_weights[name]
        if not self._on_host and is_pinned(weights):
            slot.arriving = None
            self._upload(slot, weights.memory, weights.packing.stored_bytes)
        else:
            assert self._thread is not None
            slot.arriving = self._thread.submit(self._bring, slot, weights)

    def _bring(self, slot: _Slot, weights: BlockWeights) -> None:
        """In the thread: from disk or ordinary memory towards the device."""
        started = time.perf_counter()
        size = weights.packing.stored_bytes
        if self._on_host:
            weights.fill(slot.memory[:size])
            self._report.copied(size, time.perf_counter() - started)
            return
        staging = self._staging[0]
        self._staging.reverse()
        if staging.copied is not None:
            staging.copied.synchronize()
        weights.fill(staging.memory[:size])
        self._upload(slot, staging.memory, size)
        staging.copied = slot.ready

    def _upload(self, slot: _Slot, memory: Tensor | None, size: int) -> None:
        assert memory is not None
        self._side.wait_event(slot.used)
        began = self._side.timestamp()
        with self._side.run():
            slot.memory[:size].copy_(memory[:size], non_blocking=True)
        slot.ready = self._side.record_event()
        slot.times = (began, self._side.timestamp())
        self._report.copied(size, 0.0)
