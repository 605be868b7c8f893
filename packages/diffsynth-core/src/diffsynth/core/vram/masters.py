"""Where the weights of a block come from: the one copy in host memory, or the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.core import device as devices
from diffsynth.core.loader.reading.source import ComponentSource
from diffsynth.core.vram.packing import Packing


class Master(Protocol):
    """The weights of one block, packed. They are read, never written back."""

    packing: Packing
    memory: Tensor | None
    """In host memory, `stored_bytes` bytes, if they are there."""

    def fill(self, memory: Tensor) -> None:
        """Write them, packed, to host memory."""


class HostMaster:
    """Weights in host memory, page-locked if a device is to copy from them while the host goes on.

    Args:
        packing: of the block.
        tensors: by name.
        device: that will copy from it.
        lock: whether to page-lock.
    """

    def __init__(
        self, packing: Packing, tensors: Mapping[str, Tensor], *, device: torch.device, lock: bool = True
    ) -> None:
        self.packing = packing
        self.memory: Tensor | None = host_memory(packing.stored_bytes, device, lock=lock)
        for name, view in packing.stored_views(self.memory).items():
            view.copy_(tensors[name].detach())

    @classmethod
    def read(cls, master: Master, *, device: torch.device, lock: bool = True) -> HostMaster:
        """Of another master's weights."""
        new = cls.__new__(cls)
        new.packing = master.packing
        new.memory = host_memory(master.packing.stored_bytes, device, lock=lock)
        master.fill(new.memory)
        return new

    def fill(self, memory: Tensor) -> None:
        """See `Master`."""
        assert self.memory is not None
        memory[: self.packing.stored_bytes].copy_(self.memory)


class DiskMaster:
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
        """See `Master`.

        Raises:
            CorruptFile: the file changed since its header was read, or cannot be read.
        """
        self._source.fill(self.packing.stored_views(memory))


def host_memory(size: int, device: torch.device, *, lock: bool = True) -> Tensor:
    """Bytes on the host, page-locked for an accelerator if `lock`."""
    if device.type == "cpu" or not lock:
        return torch.empty(size, dtype=torch.uint8)
    return devices.page_locked(size, device)
