"""Weights of a block while it is offloaded: in host memory, or in their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.core import device as devices
from diffsynth.core.loader.component import check_finite
from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.vram.packing import Packing
from diffsynth.core.vram.policy import Policy


class BlockWeights(Protocol):
    """The packed weights of one block. They are read, never written back.

    Attributes:
        packing: layout of the weights.
        memory: the packed weights, `stored_bytes` bytes in host memory; None if they are on disk.
    """

    packing: Packing
    memory: Tensor | None

    def fill(self, memory: Tensor) -> None:
        """Copy the block's packed weights into the first `stored_bytes` bytes of `memory`, a uint8 host tensor."""


class HostWeights:
    """Weights in host memory, pinned if a device is to copy from it asynchronously.

    Args:
        packing: layout of the weights.
        memory: the packed weights, `stored_bytes` bytes.
    """

    def __init__(self, packing: Packing, memory: Tensor) -> None:
        self.packing = packing
        self.memory: Tensor | None = memory

    @classmethod
    def copy(cls, packing: Packing, tensors: Mapping[str, Tensor], memory: Tensor) -> HostWeights:
        """Copy `tensors` (name -> parameter) into `memory`, a uint8 host tensor, in stored dtypes, and return the
        `HostWeights` that hold it.

        Args:
            packing: layout of the weights.
            tensors: parameters by name, on any device, in the dtypes that they have or can be cast from.
            memory: host memory of `stored_bytes` bytes, which is written to and held.
        """
        for name, view in packing.stored_views(memory).items():
            view.copy_(tensors[name].detach())
        return cls(packing, memory)

    @classmethod
    def read(cls, weights: BlockWeights, memory: Tensor) -> HostWeights:
        """Copy the packed weights of a block into `memory`, a uint8 host tensor, and return the `HostWeights` that hold
        it.
        """
        weights.fill(memory)
        return cls(weights.packing, memory)

    def fill(self, memory: Tensor) -> None:
        """Copy the block's packed weights into the first `stored_bytes` bytes of `memory`, a uint8 host tensor."""
        assert self.memory is not None
        memory[: self.packing.stored_bytes].copy_(self.memory)


class DiskWeights:
    """Weights in their file, read through the conversion plan of its layout.

    Args:
        packing: layout of the weights.
        source: reads the component's file; its target keys are the names of the packing.
    """

    def __init__(self, packing: Packing, source: WeightSource) -> None:
        self.packing = packing
        self.memory: Tensor | None = None
        self._source = source
        self._is_checked = False

    def fill(self, memory: Tensor) -> None:
        """Read the block's packed weights from their file into the first `stored_bytes` bytes of `memory`, a uint8 host
        tensor. They are looked at for NaN and infinity the first time.

        Raises:
            CorruptFile: the file changed since its header was read, or cannot be read; or a weight holds NaN or
                infinity.
        """
        views = self.packing.stored_views(memory)
        self._source.fill(views)
        if not self._is_checked:
            check_finite(views, self._source.where)
            self._is_checked = True


def check_source(policy: Policy, source: WeightSource | None, name: str) -> None:
    """Raise ValueError if `policy` stores weights on disk, and `source` is None or cannot read its file block by block.

    Args:
        policy: policy of the component.
        source: reads the component's file; None if it has none.
        name: name of the module for the message, if it has no source.

    Raises:
        ValueError: the policy stores weights on disk, and there is no file, or no safetensors file.
    """
    if not (policy.offload.on_disk or policy.onload.on_disk):
        return
    if source is None or not (source.streams or source.files):
        raise ValueError(
            f"the policy stores the weights of {name if source is None else source.where} on disk, but there is no "
            "file to read them from block by block. Load it from a safetensors file with the policy, or use "
            "offload_device='cpu'"
        )
    if not source.streams:
        raise ValueError(
            f"{source.where}: a policy with 'disk' reads safetensors files block by block. "
            f"Run: diffsynth convert {' '.join(map(str, source.files))} -o model.safetensors"
        )


def is_pinned(weights: BlockWeights) -> bool:
    """Whether `weights` are in pinned host memory, from which a device copies asynchronously; False for weights on
    disk.
    """
    return weights.memory is not None and weights.memory.is_pinned()


def host_memory(size: int, device: torch.device, *, pin: bool = True) -> Tensor:
    """Return an unfilled uint8 CPU tensor of `size` bytes; it is pinned if `pin` is set, `device` is not the CPU and
    the system can pin memory.

    Where the system cannot pin memory it is pageable; see `pinned_memory`.
    """
    if device.type == "cpu" or not pin:
        return torch.empty(size, dtype=torch.uint8)
    return devices.pinned_memory(size, device)


class PinnedPool:
    """Host memory for the blocks of a component, in few pinned slabs whose sizes are powers of two.

    torch's allocator rounds each pinned tensor up to a power of two, which can double the memory of a block.

    Args:
        sizes: bytes of the blocks, in the order in which they are taken.
        device: device that copies from the memory.
        pin: whether to pin it; on the CPU it never is.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, *, pin: bool = True) -> None:
        self._remaining = sum(sizes)
        self._device = device
        self._pin = pin and device.type != "cpu"
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Return an unfilled uint8 CPU tensor of `size` bytes for the next block, pinned if the pool pins memory."""
        self._remaining -= size
        if not self._pin:
            return torch.empty(size, dtype=torch.uint8)
        if size > self._slab.numel():
            needed = size + max(self._remaining, 0)
            largest = 1 << (needed.bit_length() - 1)
            self._slab = host_memory(max(largest, 1 << max(size - 1, 0).bit_length()), self._device)
        taken, self._slab = self._slab[:size], self._slab[size:]
        return taken
