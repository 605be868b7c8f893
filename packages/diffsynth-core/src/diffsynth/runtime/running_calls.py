"""The calls of a pipeline that run at the moment, in all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from diffsynth.core.attention.select import served_backends
from diffsynth.errors import PipelineError

_served: ContextVar[tuple[tuple[int, set[str]], ...]] = ContextVar("diffsynth_served", default=())
"""(id of the `RunningCalls`, names of backends) of the calls that run in this thread, the innermost last."""


class RunningCalls:
    """The calls of one pipeline that run now. Methods that change weights refuse to run beside them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[str] = []
        self._latest: frozenset[str] = frozenset()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Context manager in which a call of this thread runs."""
        name = threading.current_thread().name
        with self._lock:
            self._threads.append(name)
        try:
            with served_backends() as served:
                token = _served.set((*_served.get(), (id(self), served)))
                try:
                    yield
                finally:
                    _served.reset(token)
                    self._latest = frozenset(served)
        finally:
            with self._lock:
                self._threads.remove(name)

    @property
    def backends(self) -> frozenset[str]:
        """Names of the attention backends that served the call that runs in this thread, else the latest call."""
        running = [served for calls, served in _served.get() if calls == id(self)]
        return frozenset(running[-1]) if running else self._latest

    def refuse(self, what: str) -> None:
        """Raise PipelineError if a call runs.

        Args:
            what: the method that must not run beside a call, for the message: "load_lora()".

        Raises:
            PipelineError: a call runs, in this thread or another one.
        """
        with self._lock:
            threads = sorted(set(self._threads))
        if threads:
            raise PipelineError(
                f"{what} changes the weights, and a call of this pipeline runs in thread {', '.join(threads)}: its "
                f"result would be made with both. Wait until the call ends"
            )
