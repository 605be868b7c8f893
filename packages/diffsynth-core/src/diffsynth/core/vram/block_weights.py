"""Where the weights of a block come from: the one copy in host memory, or the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.core import device as devices
from diffsynth.core.loader.reader.source import ComponentSource
from diffsynth.core.vram.packing import Packing
from diffsynth.core.vram.policy import Policy


class BlockWeights(Protocol):
    """The weights of one block, packed. They are read, never written back."""

    packing: Packing
    memory: Tensor | None
    """In host memory, `stored_bytes` bytes, if they are there."""

    def fill(self, memory: Tensor) -> None:
        """Write them, packed, to host memory."""


class HostWeights:
    """Weights in host memory, pinned if a device is to copy from them while the host goes on.

    Args:
        packing: of the block.
        memory: `stored_bytes` bytes.
    """

    def __init__(self, packing: Packing, memory: Tensor) -> None:
        self.packing = packing
        self.memory: Tensor | None = memory

    @classmethod
    def copy(cls, packing: Packing, tensors: Mapping[str, Tensor], memory: Tensor) -> HostWeights:
        """Of tensors by name."""
        for name, view in packing.stored_views(memory).items():
            view.copy_(tensors[name].detach())
        return cls(packing, memory)

    @classmethod
    def read(cls, weights: BlockWeights, memory: Tensor) -> HostWeights:
        """Of another master's weights."""
        weights.fill(memory)
        return cls(weights.packing, memory)

    def fill(self, memory: Tensor) -> None:
        """See `BlockWeights`."""
        assert self.memory is not None
        memory[: self.packing.stored_bytes].copy_(self.memory)


class DiskWeights:
    """Weights in their file, read through the plan of its layout.

    Args:
        packing: of the block.
        source: of the component; its target keys are the names of the packing.
    """

    def __init__(self, packing: Packing, source: ComponentSource) -> None:
        self.packing = packing
        self.memory: Tensor | None = None
        self._source = source

    def fill(self, memory: Tensor) -> None:
        """See `BlockWeights`.

        Raises:
            CorruptFile: the file changed since its header was read, or cannot be read.
        """
        self._source.fill(self.packing.stored_views(memory))


def check_source(policy: Policy, source: ComponentSource | None, name: str) -> None:
    """Refuse to have weights wait on disk where nothing could read them block by block.

    Args:
        policy: that they are to be under.
        source: of the weights, or None.
        name: what the message calls the module if it has no source.

    Raises:
        ValueError: with the remedy.
    """
    if not (policy.offload.on_disk or policy.onload.on_disk):
        return
    if source is None or not (source.streams or source.files):
        raise ValueError(
            f"{name if source is None else source.where} is to wait on disk, but it has no file that could be read "
            "block by block. Load it from a safetensors file with the policy, or use offload_device='cpu'"
        )
    if not source.streams:
        raise ValueError(
            f"{source.where}: a policy with 'disk' reads safetensors files block by block. "
            f"Run: diffsynth convert {' '.join(map(str, source.files))} -o model.safetensors"
        )


def is_pinned(weights: BlockWeights) -> bool:
    """Whether a device copies from it while the host goes on."""
    return weights.memory is not None and weights.memory.is_pinned()


def host_memory(size: int, device: torch.device, *, lock: bool = True) -> Tensor:
    """Bytes on the host, pinned for an accelerator if `lock`."""
    if device.type == "cpu" or not lock:
        return torch.empty(size, dtype=torch.uint8)
    return devices.pinned_memory(size, device)


class PinnedPool:
    """Host memory for the blocks of a component, in few pinned slabs whose sizes are powers of two.

    torch's allocator rounds pinned memory up to a power of two, block by block up to twice of what is asked for.

    Args:
        sizes: bytes of the blocks, in the order they are taken.
        device: that will copy from it.
        lock: whether to pin.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, *, lock: bool = True) -> None:
        self._left = sum(sizes)
        self._device = device
        self._lock = lock and device.type != "cpu"
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Memory for the next block."""
        self._left -= size
        if not self._lock:
            return torch.empty(size, dtype=torch.uint8)
        if size > self._slab.numel():
            left = size + max(self._left, 0)
            largest = 1 << (left.bit_length() - 1)
            self._slab = host_memory(max(largest, 1 << max(size - 1, 0).bit_length()), self._device)
        taken, self._slab = self._slab[:size], self._slab[size:]
        return taken
