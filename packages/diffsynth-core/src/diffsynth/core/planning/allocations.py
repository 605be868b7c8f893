"""Bytes that are alive, on the device and on the host, and the most that there were."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

GRANULE = 512
"""Bytes to which torch's allocators for accelerators round up; on the CPU a tensor of that size is no matter."""


class AllocationTracker:
    """Counts storages, not tensors: views of one storage count once, and it counts until the last of them is gone.

    Storages on the meta device are the device's unless told otherwise, all others the host's.
    """

    def __init__(self) -> None:
        self.live = {"device": 0, "host": 0}
        self.peak = dict(self.live)
        self._known: dict[int, weakref.ref[object]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these: weights, which are counted elsewhere."""
        for tensor in tensors:
            self._remember(tensor, "device", 0)

    def allocated(self, tensor: Tensor, *, on_host: bool = False) -> None:
        """Count the storage of a tensor, unless it is counted already.

        Args:
            tensor: that was made.
            on_host: it is on meta, and stands for one in host memory.
        """
        size = tensor.untyped_storage().nbytes()
        place = "device" if tensor.is_meta and not on_host else "host"
        self._remember(tensor, place, -(-size // GRANULE) * GRANULE)

    def scratch(self, size: int) -> None:
        """Count memory of the device that an operation takes while it runs."""
        self.peak["device"] = max(self.peak["device"], self.live["device"] + size)

    def restart_peak(self) -> None:
        """Look for the most from now on."""
        self.peak = dict(self.live)

    @contextmanager
    def above(self) -> Iterator[Mapping[str, int]]:
        """The most that is alive inside, above what is alive at its beginning, by place; filled in at its end."""
        before, peak, most = dict(self.live), self.peak, {"device": 0, "host": 0}
        self.restart_peak()
        try:
            yield most
        finally:
            for place, size in before.items():
                most[place] = self.peak[place] - size
                self.peak[place] = max(self.peak[place], peak[place])

    def repeat(self, most: Mapping[str, int]) -> None:
        """Count again what went on in `above`."""
        for place, size in most.items():
            self.peak[place] = max(self.peak[place], self.live[place] + size)

    def _remember(self, tensor: Tensor, place: str, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.live[place] -= size

        # torch keeps the Python object of a storage as long as the storage itself.
        self._known[key] = weakref.ref(storage, gone)
        self.live[place] += size
        self.peak[place] = max(self.peak[place], self.live[place])
