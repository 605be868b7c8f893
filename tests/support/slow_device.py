"""A fake device that runs queued work only when it is synchronized, in the worst order that its streams allow.

Its tensors are in host memory. Copies and kernels are queued on a stream and run when an event or the device is
synchronized, so a missing wait between two streams shows as wrong content.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fake_devices import Recorded


class SlowDevice(Recorded):
    """A fake `torch.cuda` whose streams are queues.

    Args:
        prefer: stream that runs first where two could: "main", "side", or "either" at random.
    """

    def __init__(self, prefer: str) -> None:
        super().__init__(count=1)
        self.prefer = prefer
        self.dice = random.Random(0)
        self.guard = threading.RLock()
        self.local = threading.local()
        self.main = SlowStream("main")
        self.all = [self.main]
        self.Stream = self._new_stream
        self.Event = lambda enable_timing=False: SlowEvent(self)

    def _new_stream(self, device: Any) -> SlowStream:
        self.all.append(SlowStream("side"))
        return self.all[-1]

    def current_stream(self, device: Any = None) -> SlowStream:
        # As torch has it: the current stream belongs to a thread.
        return getattr(self.local, "stream", self.main)

    @contextmanager
    def stream(self, stream: SlowStream) -> Iterator[None]:
        before, self.local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.local.stream = before

    def submit(self, work: Callable[[], object]) -> None:
        """Queue work on the current stream."""
        with self.guard:
            self.current_stream().queue.append(work)

    def synchronize(self, device: Any = None) -> None:
        self.go_on(lambda: not any(stream.queue for stream in self.all))

    def go_on(self, enough: Callable[[], bool]) -> None:
        """Run queued work until `enough()`, and not one item more."""
        with self.guard:
            while not enough():
                able = [stream for stream in self.all if stream.queue and stream.is_able()]
                assert able, "deadlock: every stream waits for an event that no stream records"
                preferred = [stream for stream in able if stream.name == self.prefer]
                self.dice.choice(preferred or able).step()

    def tensor(self, size: int) -> SlowTensor:
        """Return `size` bytes of memory of the device, each 255."""
        return torch.full((size,), 255, dtype=torch.uint8).as_subclass(SlowTensor).of(self)


class SlowStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Any] = deque()

    def wait_event(self, event: SlowEvent) -> None:
        with event.module.guard:
            self.queue.append(event)

    def is_able(self) -> bool:
        return not isinstance(self.queue[0], SlowEvent) or self.queue[0].done

    def step(self) -> None:
        item = self.queue.popleft()
        if not isinstance(item, SlowEvent):
            item()


class SlowEvent:
    def __init__(self, module: SlowDevice) -> None:
        self.module, self.done = module, True

    def record(self, stream: SlowStream) -> None:
        with self.module.guard:
            self.done = False
            stream.queue.append(lambda: setattr(self, "done", True))

    def synchronize(self) -> None:
        self.module.go_on(lambda: self.done)

    def elapsed_time(self, later: SlowEvent) -> float:
        return 1.0


class SlowTensor(torch.Tensor):
    """Bytes on a `SlowDevice`; `copy_` is queued on the current stream."""

    _device: SlowDevice

    def of(self, device: SlowDevice) -> SlowTensor:
        self._device = device
        return self

    def __getitem__(self, index: Any) -> SlowTensor:
        return super().__getitem__(index).of(self._device)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> SlowTensor:
        into = self.as_subclass(torch.Tensor)
        self._device.submit(lambda: into.copy_(source))
        if not non_blocking:
            self._device.synchronize()
        return self


class LockedTensor(torch.Tensor):
    """Host memory whose `is_pinned()` is true."""

    def is_pinned(self, device: Any = None) -> bool:
        return True
