"""Uploads to an accelerator through a ring of pinned buffers, so that file reads overlap with copies."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffsynth.core import device as devices


class UploadRing:
    """A fixed number of pinned host buffers, each reused when the copy from it is done.

    Args:
        device: destination of the copies.
        buffers: number of buffers; more than there are threads that fill them.
        size: bytes of each buffer.
    """

    def __init__(self, device: torch.device | str, *, buffers: int, size: int) -> None:
        self.device = torch.device(device)
        self._free: queue.SimpleQueue[tuple[Tensor, Any]] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put((devices.pinned_memory(size, self.device), None))

    @contextmanager
    def buffer(self) -> Iterator[Tensor]:
        """Context manager that yields a free uint8 host buffer, waiting for one if needed, to fill and then `upload`
        from.
        """
        memory, copied = self._free.get()
        event = None
        try:
            if copied is not None:
                copied.synchronize()
            yield memory
            event = devices.record_event(self.device)
        finally:
            # Also after an error: threads that wait for a buffer would block forever.
            self._free.put((memory, event))

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start the copies of `pairs`: from the first tensor (a view of a buffer) into the second, on the device, of
        equal dtype.
        """
        for source, destination in pairs:
            destination.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Block the host until all copies to the device are done."""
        devices.synchronize(self.device)
