"""Streams, events and timestamps of a device.

CUDA and NPU have streams and events. MPS and the CPU have one queue, in which work runs in the order of its submission:
a side stream is that queue, an event is None, and there is never anything to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from diffsynth.core.device.backends import backend_and_module
from diffsynth.core.device.names import default_device


class SideStream:
    """A stream for work beside the current stream. This class is for devices without streams: work runs in order.

    Args:
        device: the device that does the work.

    Attributes:
        overlaps: whether its work overlaps with the current stream and the host.
    """

    overlaps = False

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def run(self) -> AbstractContextManager[None]:
        """Return a context manager in which new work goes to this stream; without streams it has no effect."""
        return _in_order()

    def record_event(self) -> Any:
        """Return a torch event that completes with all work submitted so far; without events wait for that work and
        return None.
        """
        return record_event(self.device)

    def wait_event(self, event: Any) -> None:
        """Let work submitted from now on wait for `event`, from the same device, without blocking the host; None has no
        effect, without events others raise ValueError.

        Args:
            event: from `record_event`; None does nothing.

        Raises:
            ValueError: an event, though this device has none.
        """
        wait_event(event, self.device)

    def timestamp(self) -> Timestamp:
        """Return a `Timestamp` for the moment at which all work submitted so far is done; without events the host waits
        for it.
        """
        return timestamp(self.device)


class OverlappingStream(SideStream):
    """A side stream on a device with streams."""

    overlaps = True

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        _, self._module = backend_and_module(device)
        self._stream = self._module.Stream(device=self.device)

    def run(self) -> AbstractContextManager[None]:
        """Return a context manager in which this stream is torch's current stream, so that new work goes to it."""
        return self._module.stream(self._stream)

    def record_event(self) -> Any:
        """Return a torch event that completes when all work submitted to this stream so far is done."""
        return _record(self._module.Event(), self._stream)

    def wait_event(self, event: Any) -> None:
        """Let work submitted to this stream from now on wait for `event`; None has no effect."""
        if event is not None:
            self._stream.wait_event(event)

    def timestamp(self) -> Timestamp:
        """Return a `Timestamp` for the moment at which all work submitted to this stream so far is done."""
        return Timestamp(_record(self._module.Event(enable_timing=True), self._stream))


class Timestamp:
    """A point in the work of a stream; on a device without streams the time of its creation.

    Args:
        event: an event with timing after the work; None on a device without events.
    """

    def __init__(self, event: Any = None) -> None:
        self._event = event
        self._host_time = time.perf_counter()

    def seconds_since(self, earlier: Timestamp) -> float:
        """Return the seconds, a float, from the `Timestamp` `earlier` to this one, both of one device; the host waits
        for this one.
        """
        if self._event is None:
            return self._host_time - earlier._host_time
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


def side_stream(device: torch.device | str) -> SideStream:
    """Return a new `SideStream`, whose work overlaps with the current stream; on MPS and the CPU its work runs in
    order.

    A tensor that is made in one stream and used in another must live until an event after its use, or the allocator
    reuses its memory too early.

    Raises:
        ValueError: an unknown kind of device.
    """
    backend, module = backend_and_module(device)
    return OverlappingStream(device) if backend.streams and module is not None else SideStream(device)


def record_event(device: torch.device | str) -> Any:
    """Return a torch event that completes with all work on the device's current stream so far; None on MPS and the CPU.

    Without events (MPS) the host waits now, and the result is None.
    """
    backend, module = backend_and_module(device)
    if not backend.streams or module is None:
        synchronize(device)
        return None
    return _record(module.Event(), module.current_stream(torch.device(device)))


def timestamp(device: torch.device | str) -> Timestamp:
    """Return a `Timestamp` for the moment at which all work submitted to the device's current stream is done.

    Without events (MPS) the host waits now.
    """
    backend, module = backend_and_module(device)
    if not backend.streams or module is None:
        synchronize(device)
        return Timestamp()
    return Timestamp(_record(module.Event(enable_timing=True), module.current_stream(torch.device(device))))


def wait_event(event: Any, device: torch.device | str) -> None:
    """Let the device's current stream wait for `event` before its later work, without blocking the host; None has no
    effect, an event on MPS or the CPU raises ValueError.

    Args:
        event: from `record_event` or `SideStream.record_event`; None does nothing.
        device: the device of the event.

    Raises:
        ValueError: an event, though this device has none.
    """
    if event is None:
        return
    backend, module = backend_and_module(device)
    if not backend.streams or module is None:
        raise ValueError(f"{event!r}: {backend.label} has no events; pass the result of record_event()")
    module.current_stream(torch.device(device)).wait_event(event)


def synchronize(device: torch.device | str | None = None) -> None:
    """Block the host until all work of a device (None: the default device) is done; do nothing on the CPU."""
    device = default_device() if device is None else torch.device(device)
    backend, module = backend_and_module(device)
    if module is not None:
        module.synchronize(device) if backend.indexed else module.synchronize()


def _record(event: Any, stream: Any) -> Any:
    event.record(stream)
    return event


@contextmanager
def _in_order() -> Iterator[None]:
    yield
