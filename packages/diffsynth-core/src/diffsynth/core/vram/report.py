"""Counts and times of the transfers of one component."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from diffsynth.core.device import Timestamp

_MAX_PENDING = 4096
"""Copies after which the device is asked for their times."""


@dataclass
class TransferReport:
    """Transfers of one component since it was wrapped, or since `clear()`.

    Args:
        bytes_moved: bytes copied to the device, or read from disk where computation is on the CPU.
        seconds_copying: sum of the times of the copies. On a device with streams they are timed by its events.
        seconds_waited: time that computation waited for copies.
        hits: calls of blocks whose copy had begun before.
        misses: calls of blocks whose copy had not begun.
    """

    bytes_moved: int = 0
    seconds_copying: float = 0.0
    seconds_waited: float = 0.0
    hits: int = 0
    misses: int = 0
    _pending: list[tuple[Timestamp, Timestamp, Timestamp]] = field(default_factory=list, repr=False, compare=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @property
    def bytes_per_second(self) -> float:
        """Throughput of the copies to the device, in bytes per second; 0.0 without copies."""
        return self.bytes_moved / self.seconds_copying if self.seconds_copying else 0.0

    @property
    def hidden_share(self) -> float:
        """Share of the copying time during which computation did not wait, a float from 0 to 1; 1.0 without copies."""
        if not self.seconds_copying:
            return 1.0
        return min(max(1 - self.seconds_waited / self.seconds_copying, 0.0), 1.0)

    def copied(self, size: int, seconds: float) -> None:
        """Add `size` to the bytes moved, and `seconds` to the time of copying."""
        with self._lock:
            self.bytes_moved += size
            self.seconds_copying += seconds

    def waited(self, seconds: float, *, hit: bool | None = None) -> None:
        """Add `seconds` to the time that computation waited, and 1 to the hits or to the misses if the wait was for a
        call of a block.

        Args:
            seconds: time that computation waited, by the host's clock.
            hit: whether the copy of the block had begun before; None if the wait is for no call of a block.
        """
        with self._lock:
            self.seconds_waited += seconds
            self.hits += hit is True
            self.misses += hit is False

    def timed(self, began: Timestamp, ended: Timestamp, needed: Timestamp) -> None:
        """Keep three timestamps of a copy, from the device's clock; `settle` adds the copy's time and wait to the
        counts later.

        Args:
            began: when the copy began.
            ended: when the copy ended.
            needed: when computation was ready to read the weights.
        """
        with self._lock:
            self._pending.append((began, ended, needed))
            if len(self._pending) >= _MAX_PENDING:
                self.settle()

    def settle(self) -> TransferReport:
        """Wait for the copies that `timed` kept, add their times and waits to the counts, and return this same
        `TransferReport`.
        """
        with self._lock:
            pending, self._pending = self._pending, []
            for began, ended, needed in pending:
                self.seconds_copying += ended.seconds_since(began)
                self.seconds_waited += max(ended.seconds_since(needed), 0.0)
        return self

    def clear(self) -> None:
        """Set all counts and times of the report to 0, and forget the copies that `timed` kept."""
        with self._lock:
            self._pending.clear()
            self.bytes_moved, self.hits, self.misses = 0, 0, 0
            self.seconds_copying = self.seconds_waited = 0.0

    def __str__(self) -> str:
        return (
            f"{self.bytes_moved / 1e9:.2f} GB moved at {self.bytes_per_second / 1e9:.1f} GB/s, "
            f"{self.hidden_share:.0%} of it hidden ({self.seconds_waited:.2f} s waited; "
            f"{self.hits} blocks in time, {self.misses} not)"
        )
