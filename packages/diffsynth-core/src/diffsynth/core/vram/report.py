"""What transfers cost: the offload report."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from diffsynth.core.device import Timestamp

_PENDING = 4096
"""Copies whose times are asked for together."""


@dataclass
class TransferReport:
    """Of one component since it was wrapped, or since `clear()`.

    Args:
        bytes_moved: to the device, or from disk where computation is on the CPU.
        seconds_copying: that copies took, one after the other. On a device with streams they are timed by its events.
        seconds_waited: that computation stood still for them.
        hits: blocks that were on their way when their turn came.
        misses: blocks that were not.
    """

    bytes_moved: int = 0
    seconds_copying: float = 0.0
    seconds_waited: float = 0.0
    hits: int = 0
    misses: int = 0
    _pending: list[tuple[Timestamp, Timestamp, Timestamp]] = field(default_factory=list, repr=False, compare=False)
    _guard: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @property
    def bytes_per_second(self) -> float:
        """Achieved by the copies; 0 if there was none."""
        return self.bytes_moved / self.seconds_copying if self.seconds_copying else 0.0

    @property
    def hidden_share(self) -> float:
        """Share of the copying that computation did not wait for, in [0, 1]; 1 if there was none."""
        if not self.seconds_copying:
            return 1.0
        return min(max(1 - self.seconds_waited / self.seconds_copying, 0.0), 1.0)

    def copied(self, size: int, seconds: float) -> None:
        """Count a copy."""
        with self._guard:
            self.bytes_moved += size
            self.seconds_copying += seconds

    def waited(self, seconds: float, *, hit: bool | None = None) -> None:
        """Count a wait; `hit` says whether it was for a block that was on its way, None that it was for no block."""
        with self._guard:
            self.seconds_waited += seconds
            self.hits += hit is True
            self.misses += hit is False

    def timed(self, began: Timestamp, ended: Timestamp, asked: Timestamp) -> None:
        """Count the time of a copy by the device's clock, and the wait of a block that asked for it."""
        with self._guard:
            self._pending.append((began, ended, asked))
            if len(self._pending) >= _PENDING:
                self.settle()

    def settle(self) -> TransferReport:
        """Ask the device for the times that are still out; the host waits until they are known."""
        with self._guard:
            pending, self._pending = self._pending, []
            for began, ended, asked in pending:
                self.seconds_copying += ended.seconds_since(began)
                self.seconds_waited += max(ended.seconds_since(asked), 0.0)
        return self

    def clear(self) -> None:
        """Begin anew."""
        with self._guard:
            self._pending.clear()
            self.bytes_moved, self.hits, self.misses = 0, 0, 0
            self.seconds_copying = self.seconds_waited = 0.0

    def __str__(self) -> str:
        return (
            f"{self.bytes_moved / 1e9:.2f} GB moved at {self.bytes_per_second / 1e9:.1f} GB/s, "
            f"{self.hidden_share:.0%} of it hidden ({self.seconds_waited:.2f} s waited; "
            f"{self.hits} blocks in time, {self.misses} not)"
        )
