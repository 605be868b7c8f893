"""Blocks that stay on a device for a stage: they come when it begins, or set out before, while another stage runs."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsynth.core import device as devices
from diffsynth.core.vram.block_weights import BlockWeights, is_pinned
from diffsynth.core.vram.report import TransferReport


@dataclass(frozen=True)
class _Arrival:
    """A copy on its way: the event behind it, and when it began and ended by the device's clock."""

    ready: Any
    began: devices.Timestamp
    ended: devices.Timestamp


class ResidentBlocks:
    """Packed weights that are on a device until they are dropped.

    Args:
        device: where they go; on the CPU they are where they wait.
        report: counts what happens.
    """

    def __init__(self, device: torch.device, report: TransferReport) -> None:
        self._device = device
        self._report = report
        self._side = devices.side_stream(device)
        self._memory: dict[str, Tensor] = {}
        self._arriving: dict[str, _Arrival] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._memory

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._memory.values())

    def get(self, name: str) -> Tensor | None:
        """The weights of a block, which the device may read from now on; None if they are not here."""
        memory, arrival = self._memory.get(name), self._arriving.pop(name, None)
        if arrival is not None:
            self._report.timed(arrival.began, arrival.ended, devices.timestamp(self._device))
            devices.wait_event(arrival.ready, self._device)
        return memory

    def bring(self, name: str, weights: BlockWeights, *, converted: bool = False) -> Tensor:
        """Have a block here, as it waits or as it is computed with; what is here or on its way is not brought again."""
        if (there := self.get(name)) is not None:
            return there
        started, packing, memory = time.perf_counter(), weights.packing, weights.memory
        if memory is None:
            memory = torch.empty(packing.stored_bytes, dtype=torch.uint8)
            weights.fill(memory)
        seconds = time.perf_counter() - started
        began = devices.timestamp(self._device)
        stored = memory if self._device.type == "cpu" else self._empty(packing.stored_bytes)
        if stored is not memory:
            stored.copy_(memory, non_blocking=True)
        if stored is not weights.memory:
            self._report.copied(packing.stored_bytes, seconds)
            self._report.waited(seconds)
            # The host does not stay for the copy, so its clock would tell how long the asking took.
            self._report.timed(began, devices.timestamp(self._device), began)
        if converted and packing.converts:
            computed = self._empty(packing.computed_bytes)
            packing.convert(stored, computed)
            stored = computed
        self._memory[name] = stored
        return stored

    def can_send(self, weights: BlockWeights) -> bool:
        """Whether a block can come while the device computes and the host goes on."""
        return self._side.overlaps and is_pinned(weights)

    def send(self, name: str, weights: BlockWeights) -> None:
        """Have a block set out on a queue of its own; see `can_send`. `get` waits for it."""
        size = weights.packing.stored_bytes
        memory, source = self._empty(size), weights.memory
        assert source is not None
        # The allocator may give out memory that earlier work of the computing queue still reads.
        self._side.wait_event(devices.record_event(self._device))
        began = self._side.timestamp()
        with self._side.run():
            memory.copy_(source[:size], non_blocking=True)
        self._memory[name] = memory
        self._arriving[name] = _Arrival(self._side.record_event(), began, self._side.timestamp())
        self._report.copied(size, 0.0)

    def drop(self, names: Collection[str] | None = None) -> None:
        """Let go of some, or of all; their memory is somebody else's once the device has done what it was given."""
        for name in list(self._memory) if names is None else names:
            if (arrival := self._arriving.pop(name, None)) is not None:
                # The memory goes back to an allocator that knows nothing of the other queue.
                devices.wait_event(arrival.ready, self._device)
            del self._memory[name]

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)
