"""Streamed blocks: their weights are copied into a ring of slots on the device while earlier blocks compute."""

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
        memory: the bytes.
        block: name of the block whose weights are in it, or are being copied to it.
        reading: the thread's work on that copy, if the thread does it.
        ready: event behind the copy.
        times: when the copy began and ended, by the device's clock.
        used: event behind the last computation that read the memory.
    """

    memory: Tensor
    block: str | None = None
    reading: Future[Any] | None = None
    ready: Any = None
    times: tuple[devices.Timestamp, devices.Timestamp] | None = None
    used: Any = None


@dataclass
class _StagingBuffer:
    """Pinned memory between disk or pageable memory and the device; `copied` is the event behind its last use."""

    memory: Tensor
    copied: Any = None


class BlockOrder:
    """The order in which blocks are called, as recorded in the last pass: the successor of each block.

    It also counts how often each block is called in a step of the loop, which predicts the next step.

    Args:
        names: names of the blocks in the order that is expected at first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._next = dict(zip(names, [*names[1:], *names[:1]], strict=True))
        self._first = next(iter(names), None)
        self._last: str | None = None
        self._calls: Counter[str] = Counter()
        self._calls_before: Counter[str] = Counter()

    def begin_stage(self) -> None:
        """Begin a stage: forget which block was called last, so that the next one called is recorded as the first."""
        self._last = None

    def begin_step(self, *, is_first: bool) -> None:
        """Begin a step of a loop: count calls of blocks from 0, and keep the counts of the step before unless
        `is_first` is set.

        If `is_first` no counts are kept: nothing is known of a step yet.
        """
        self._calls_before, self._calls = Counter() if is_first else self._calls, Counter()

    def called(self, name: str) -> None:
        """Count a call of block `name` and record it as the successor of the block called before; without one, as the
        first.
        """
        self._calls[name] += 1
        if self._last is None:
            self._first = name
        else:
            self._next[self._last] = name
        self._last = name

    def calls_in_last_step(self, name: str) -> int:
        """Return how often block `name` was called in the step before the current one, an int; 0 if there was none."""
        return self._calls_before[name]

    def after(self, name: str | None) -> Iterator[str]:
        """Yield the names of the blocks expected after block `name`, in order, each once; after None those from the
        first block on.
        """
        seen = {name}
        following = self._first if name is None else self._next[name]
        while following is not None and following not in seen:
            yield following
            seen.add(following)
            following = self._next[following]


class BlockStream:
    """Provides the weights of each block on the device when it is called, and prefetches those of the next blocks.

    A wrong prediction of the order costs time, and never gives wrong weights.

    Weights in pinned memory are copied by the device alone, on a stream of its own. Others, those on disk among them,
    are read by a thread and go through two staging buffers. On the CPU the thread reads into the slot itself.

    Args:
        block_weights: weights of the streamed blocks, by name.
        device: device of the slots.
        slots: number of blocks on the device at once, at least 1; with 1 no copy is hidden.
        order: predicts which block follows which; the caller records the calls.
        report: counts the transfers.
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
        self._finished: set[str] = set()
        self._side = devices.side_stream(device)
        memories = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(slots, len(block_weights)))
        ]
        # The allocator may return memory that earlier work of the computing stream still reads.
        self._slots = [_Slot(memory, used=devices.record_event(device)) for memory in memories]
        self._on_host = device.type == "cpu" and not self._side.overlaps
        is_staged = not self._on_host and any(not is_pinned(weights) for weights in block_weights.values())
        self._staging = [_StagingBuffer(host_memory(largest, device)) for _ in range(2 if is_staged else 0)]
        needs_thread = is_staged or (self._on_host and bool(block_weights))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffsynth-vram") if needs_thread else None
        self._prefetch_after(None)

    @property
    def device_bytes(self) -> int:
        """Size of all slots (device memory for one block each) together, in bytes."""
        return sum(slot.memory.numel() for slot in self._slots)

    def acquire(self, name: str) -> Tensor:
        """Return the uint8 tensor of a slot (device memory for one block), which begins with the packed weights of
        block `name` until `release`.

        It also begins to copy the next blocks.
        """
        slot = self._slot_of(name)
        hit = slot is not None
        if slot is None:
            slot = self._free_slot(())
            assert slot is not None, "one block at a time"
            self._copy_to(slot, name)
        started = time.perf_counter()
        if slot.reading is not None:
            try:
                slot.reading.result()
            except BaseException:
                # The slot has no valid weights, so the next call must read them again.
                slot.block = None
                raise
        if slot.times is not None:
            self._report.timed(*slot.times, devices.timestamp(self._device))
            slot.times = None
        devices.wait_event(slot.ready, self._device)
        self._report.waited(time.perf_counter() - started, hit=hit)
        self._in_use = slot
        self._prefetch_after(name)
        return slot.memory

    def release(self, name: str) -> None:
        """Release the slot (device memory) of block `name`, the one in use: another block may overwrite it once the
        device has done its earlier work; with several slots, begin to copy the next blocks.
        """
        slot = self._in_use
        assert slot is not None, f"{name} is released, but no slot is in use"
        assert slot.block == name, f"{name} is released, but {slot.block} is in use"
        slot.used = devices.record_event(self._device)
        self._in_use = None
        if len(self._slots) > 1:
            self._prefetch_after(name)

    def finish(self, name: str) -> None:
        """Stop prefetching block `name`, as it is not expected to be called again; if it is, it is copied then."""
        self._finished.add(name)

    def close(self) -> None:
        """Stop the thread and free the staging buffers and slots (host and device memory), after the copies that have
        begun.
        """
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        # The slots' memory goes back to an allocator that does not know of the side stream.
        devices.wait_event(self._side.record_event(), self._device)
        for staging in self._staging:
            if staging.copied is not None:
                staging.copied.synchronize()
        self._slots, self._staging, self._in_use = [], [], None

    def _prefetch_after(self, name: str | None) -> None:
        """Begin to copy the blocks expected after block `name` (None: the first ones) that no slot holds yet, as many
        as there are free slots for.
        """
        room = len(self._slots) - (self._in_use is not None)
        expected = (
            each for each in self._order.after(name) if each in self._block_weights and each not in self._finished
        )
        wanted = tuple(itertools.islice(expected, room))
        for following in wanted:
            if self._slot_of(following) is None:
                slot = self._free_slot(wanted if name is None else (name, *wanted))
                if slot is None:
                    return
                self._copy_to(slot, following)

    def _slot_of(self, name: str) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == name), None)

    def _free_slot(self, wanted: Collection[str]) -> _Slot | None:
        """Return a `_Slot` that is not in use and holds no block named in `wanted`, an empty one if there is one; None
        if none is free.
        """
        free = [slot for slot in self._slots if slot is not self._in_use and slot.block not in wanted]
        return min(free, key=lambda slot: slot.block is not None, default=None)

    def _copy_to(self, slot: _Slot, name: str) -> None:
        if slot.reading is not None and not slot.reading.cancel():
            # The thread still reads a block that was wrongly predicted: its bytes would overwrite what is copied
            # without the thread. An error of that read is raised when its block is needed.
            slot.reading.exception()
        slot.block = name
        weights = self._block_weights[name]
        if not self._on_host and is_pinned(weights):
            slot.reading = None
            self._upload(slot, weights.memory, weights.packing.stored_bytes)
        else:
            assert self._thread is not None
            slot.reading = self._thread.submit(self._read_to, slot, weights)

    def _read_to(self, slot: _Slot, weights: BlockWeights) -> None:
        """Read the packed weights of a block from disk or host memory and copy them into the memory of `slot`; runs in
        the thread.
        """
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
