"""Host to accelerator through a ring of pinned buffers, so that reading goes on while copies are in flight."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffsynth.core import device as devices


class UploadRing:
    """A fixed number of host buffers. Each is filled by a thread, copied from, and free again when its copy is done.

    Args:
        device: where copies go.
        buffers: how many; more than there are threads that fill them.
        size: bytes of each.
    """

    def __init__(self, device: torch.device | str, *, buffers: int, size: int) -> None:
        self.device = torch.device(device)
        self._free: queue.SimpleQueue[tuple[Tensor, Any]] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put((devices.pinned_memory(size, self.device), None))

    @contextmanager
    def buffer(self) -> Iterator[Tensor]:
        """A buffer of bytes to fill and `upload` from; whatever was uploaded is in flight when the `with` ends."""
        memory, copied = self._free.get()
        event = None
        try:
            if copied is not None:
                copied.synchronize()
            yield memory
            event = devices.mark(self.device)
        finally:
            # Also after an error: the threads that wait for a buffer must get one to find out.
            self._free.put((memory, event))

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy from parts of a buffer to tensors on the device: (source, destination) of equal dtype."""
        for source, destination in pairs:
            destination.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Until everything has arrived."""
        devices.synchronize(self.device)
