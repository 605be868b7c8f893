"""A few threads that work through tasks in order and stop together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

THREADS = 4
"""Where reads stopped getting faster (docs/loading-speed.md)."""


def work_through(tasks: Sequence[Callable[[], None]], threads: int = THREADS) -> None:
    """Run tasks, begun in their order, `threads` at a time.

    Raises:
        BaseException: the first that a task raised, or that interrupted the wait; no task begins after it.
    """
    threads = min(threads, len(tasks))
    if threads < 2:
        for task in tasks:
            task()
        return
    waiting, lock, stop = iter(tasks), threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                task = next(waiting, None)
            if task is None:
                return
            try:
                task()
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads, thread_name_prefix="diffsynth-read") as pool:
        try:
            crew = [pool.submit(work) for _ in range(threads)]
            for member in crew:
                member.result()
        finally:
            stop.set()


class ByteBudget:
    """Bytes that threads may hold together. One that asks for more than all of it gets it when nobody holds any.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Hold `size` bytes inside the `with`; waits until they are free."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._size)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()
