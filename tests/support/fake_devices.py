"""Fakes of torch's device modules, for tests of `diffsynth.core.device` on machines without such devices.

`FULL` behaves like `torch.cuda` and records, in order, the operations on each stream. `BARE` has no streams, no
pinning, no float8 and no memory statistics: the minimum that a backend may have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffsynth.core.device import backends

FULL, BARE = "cuda", "privateuseone"


class Recorded:
    """A fake `torch.cuda` with `count` devices; `log` holds (stream, operation) in order."""

    def __init__(self, count: int = 2) -> None:
        self.log: list[tuple[str, str]] = []
        self.count = count
        self.streams, self.events = itertools.count(1), itertools.count(1)
        self.current = Stream(self, "main")
        self.Stream = lambda device: Stream(self, f"side{next(self.streams)} of {device}")
        self.Event = lambda enable_timing=False: Event(self, f"event{next(self.events)}")

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device) -> str:
        return f"Fake {device}"

    def get_device_capability(self, device) -> tuple[int, int]:
        return 9, 0

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream) -> Iterator[None]:
        self.current, before = stream, self.current
        try:
            yield
        finally:
            self.current = before

    def work(self, what: str) -> None:
        """Record an operation on the current stream, as a kernel or a copy would be."""
        self.log.append((self.current.name, what))

    def synchronize(self, device) -> None:
        self.log.append(("host", f"waits for {device}"))

    def empty_cache(self) -> None:
        self.log.append(("host", "empties the cache"))

    def mem_get_info(self, device) -> tuple[int, int]:
        return 1000, 9000

    def memory_reserved(self, device) -> int:
        return 70

    def memory_allocated(self, device) -> int:
        return 20

    def max_memory_allocated(self, device) -> int:
        return 50

    def reset_peak_memory_stats(self, device) -> None:
        self.log.append(("host", f"resets the peak of {device}"))

    def get_rng_state(self, device) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state, device) -> None:
        self.log.append(("host", f"sets {state.numel()} bytes of randomness of {device}"))


class Stream:
    def __init__(self, module: Recorded, name: str) -> None:
        self.module, self.name = module, name

    def wait_event(self, event: Event) -> None:
        self.module.log.append((self.name, f"waits for {event.name}"))


class Event:
    def __init__(self, module: Recorded, name: str) -> None:
        self.module, self.name = module, name

    def record(self, stream: Stream) -> None:
        self.module.log.append((stream.name, f"records {self.name}"))

    def synchronize(self) -> None:
        self.module.log.append(("host", f"waits for {self.name}"))

    def elapsed_time(self, later: Event) -> float:
        return 1000.0 * (int(later.name.removeprefix("event")) - int(self.name.removeprefix("event")))


class Bare:
    """A fake module of a backend that has `synchronize` and random states, and nothing else."""

    def __init__(self) -> None:
        self.waited = 0

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waited += 1

    def empty_cache(self) -> None:
        pass

    def get_rng_state(self) -> torch.Tensor:
        return torch.zeros(4, dtype=torch.uint8)

    def set_rng_state(self, state) -> None:
        assert state.numel() == 4


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    """Two recorded CUDA devices and the CPU; no other backend."""
    module = Recorded()
    monkeypatch.setattr(backends, "torch_module", {FULL: module}.get)
    monkeypatch.setattr(torch.version, "hip", None)
    return module


@pytest.fixture
def bare(monkeypatch) -> Bare:
    """One device of a backend added as `docs/devices.md` describes, without anything that is optional."""
    module = Bare()
    toy = backends.Backend(
        BARE, "Toy", unsupported_dtypes=frozenset({torch.float64, torch.float8_e4m3fn, torch.float8_e5m2})
    )
    monkeypatch.setitem(backends.BACKENDS, BARE, toy)
    monkeypatch.setattr(backends, "torch_module", {BARE: module}.get)
    return module
