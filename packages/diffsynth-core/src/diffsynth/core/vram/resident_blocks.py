"""Blocks that stay on a device for a stage: loaded when it begins, or prefetched while another stage runs."""

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
class _Copy:
    """An asynchronous copy: the event behind it, and when it began and ended by the device's clock."""

    ready: Any
    began: devices.Timestamp
    ended: devices.Timestamp


class ResidentBlocks:
    """Packed weights of blocks that are on a device until they are dropped.

    Args:
        device: device of the weights. On the CPU, weights in host memory are used in place.
        report: counts the transfers.
    """

    def __init__(self, device: torch.device, report: TransferReport) -> None:
        self._device = device
        self._report = report
        self._side = devices.side_stream(device)
        self._memory: dict[str, Tensor] = {}
        self._copies: dict[str, _Copy] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._memory

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._memory.values())

    def get(self, name: str) -> Tensor | None:
        """Return the packed weights of block `name`, a uint8 tensor that the device may read from now on; None if the
        block is not loaded.
        """
        memory, copy = self._memory.get(name), self._copies.pop(name, None)
        if copy is not None:
            self._report.timed(copy.began, copy.ended, devices.timestamp(self._device))
            devices.wait_event(copy.ready, self._device)
        return memory

    def load(self, name: str, weights: BlockWeights, *, converted: bool = False) -> Tensor:
        """Return the packed weights of block `name` on the device, a uint8 tensor: as they are there already, else
        newly loaded, in stored dtypes or, if `converted` is set, in computed dtypes.

        Args:
            name: name of the block.
            weights: its weights in host memory or on disk.
            converted: return them in computed dtypes instead of stored ones.
        """
        if (loaded := self.get(name)) is not None:
            return loaded
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
            # The host does not wait for the copy, so only the device's clock measures it.
            self._report.timed(began, devices.timestamp(self._device), began)
        if converted and packing.converts:
            computed = self._empty(packing.computed_bytes)
            packing.convert(stored, computed)
            stored = computed
        self._memory[name] = stored
        return stored

    def can_prefetch(self, weights: BlockWeights) -> bool:
        """Whether the weights are pinned and the device can copy them while it computes and the host continues."""
        return self._side.overlaps and is_pinned(weights)

    def prefetch(self, name: str, weights: BlockWeights) -> None:
        """Begin to copy block `name` to the device on a stream of its own, beside the computation; `get` waits for the
        copy.

        Call it only if `can_prefetch`.
        """
        size = weights.packing.stored_bytes
        memory, source = self._empty(size), weights.memory
        assert source is not None
        # The allocator may return memory that earlier work of the computing stream still reads.
        self._side.wait_event(devices.record_event(self._device))
        began = self._side.timestamp()
        with self._side.run():
            memory.copy_(source[:size], non_blocking=True)
        self._memory[name] = memory
        self._copies[name] = _Copy(self._side.record_event(), began, self._side.timestamp())
        self._report.copied(size, 0.0)

    def drop(self, names: Collection[str] | None = None) -> None:
        """Free the device memory of the blocks in `names` (None: of all blocks), once the device has done its earlier
        work.
        """
        for name in list(self._memory) if names is None else names:
            if (copy := self._copies.pop(name, None)) is not None:
                # The memory goes back to an allocator that does not know of the side stream.
                devices.wait_event(copy.ready, self._device)
            del self._memory[name]

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)
