"""Queues of work on a device, and waiting for them.

CUDA and NPU have streams and events. On MPS and the CPU everything happens in the order it is asked for: a side stream
is the only stream, an event is None, and there is never anything left to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from diffsynth.core.device.backends import driven
from diffsynth.core.device.names import default_device


class SideStream:
    """A queue of work beside the current one. This one is of a device without queues: all happens in order, at once.

    Args:
        device: where the work is done.

    Attributes:
        overlaps: whether its work goes on while the current stream and the host go on.
    """

    overlaps = False

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def run(self) -> AbstractContextManager[None]:
        """Inside the `with`, what the device is given goes into this queue."""
        return _in_order()

    def mark(self) -> Any:
        """An event behind all that the queue was given so far; None where there is nothing to wait for."""
        return mark(self.device)

    def wait(self, event: Any) -> None:
        """What the queue is given from now on comes after an event of this device; the host goes on. None is nothing.

        Raises:
            ValueError: an event, though this device has none.
        """
        wait_for(event, self.device)

    def timestamp(self) -> Timestamp:
        """When the queue has done what it was given so far."""
        return timestamp(self.device)


class _Queue(SideStream):
    overlaps = True

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        _, self._module = driven(device)
        self._stream = self._module.Stream(device=self.device)

    def run(self) -> AbstractContextManager[None]:
        return self._module.stream(self._stream)

    def mark(self) -> Any:
        return _recorded(self._module.Event(), self._stream)

    def wait(self, event: Any) -> None:
        if event is not None:
            self._stream.wait_event(event)

    def timestamp(self) -> Timestamp:
        return Timestamp(_recorded(self._module.Event(enable_timing=True), self._stream))


class Timestamp:
    """A moment in a queue of work; without queues the moment it was made.

    Args:
        event: behind the work, one that tells the time; None where there are no events.
    """

    def __init__(self, event: Any = None) -> None:
        self._event = event
        self._moment = time.perf_counter()

    def seconds_since(self, earlier: Timestamp) -> float:
        """Seconds from an earlier one of the same device to this; the host waits until this one is reached."""
        if self._event is None:
            return self._moment - earlier._moment
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


def side_stream(device: torch.device | str) -> SideStream:
    """A second queue of work on a device; on MPS and the CPU, which have one only, its work happens in order, at once.

    A tensor that is made in one queue and used in another must live until an event behind its use, or its memory is
    handed out again too early.

    Raises:
        ValueError: a kind of device that diffsynth does not know.
    """
    backend, module = driven(device)
    return _Queue(device) if backend.streams and module is not None else SideStream(device)


def mark(device: torch.device | str) -> Any:
    """An event behind all that the device's current stream was given so far; its `synchronize()` waits for that.

    None where there is nothing to wait for, or no events (MPS): there the wait is now.
    """
    backend, module = driven(device)
    if not backend.streams or module is None:
        synchronize(device)
        return None
    return _recorded(module.Event(), module.current_stream(torch.device(device)))


def timestamp(device: torch.device | str) -> Timestamp:
    """When the device has done what its current stream was given so far. Without events (MPS) the host waits now."""
    backend, module = driven(device)
    if not backend.streams or module is None:
        synchronize(device)
        return Timestamp()
    return Timestamp(_recorded(module.Event(enable_timing=True), module.current_stream(torch.device(device))))


def wait_for(event: Any, device: torch.device | str) -> None:
    """What the device's current stream is given from now on comes after an event; the host goes on. None is nothing.

    Raises:
        ValueError: an event, though this device has none.
    """
    if event is None:
        return
    backend, module = driven(device)
    if not backend.streams or module is None:
        raise ValueError(f"{event!r}: {backend.label} has no events; give what mark() or SideStream.mark() returned")
    module.current_stream(torch.device(device)).wait_event(event)


def synchronize(device: torch.device | str | None = None) -> None:
    """Have the host wait for all work of a device; there is none on the CPU. None is the default device."""
    device = default_device() if device is None else torch.device(device)
    backend, module = driven(device)
    if module is not None:
        module.synchronize(device) if backend.indexed else module.synchronize()


def _recorded(event: Any, stream: Any) -> Any:
    event.record(stream)
    return event


@contextmanager
def _in_order() -> Iterator[None]:
    yield
