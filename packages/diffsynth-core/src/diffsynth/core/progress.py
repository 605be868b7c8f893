"""Progress of loads and calls: reports from the code that does the work to the callback of the caller.

    with reporting(on_progress, cancel=cancel):
        with task("load", total=size, unit="bytes", description="dit") as current:
            current.advance(count)

`diffsynth.load` and calls of pipelines open `reporting` with the caller's `on_progress`; downloads, file readers, units
and autoencoders below them report without an argument for it. Each `reporting` belongs to the code that runs in it and
in the threads that this code gives its task: calls in other threads, or a call inside of a call, do not mix reports.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from diffsynth.errors import Cancelled, shown

Item = TypeVar("Item")

_INTERVAL = 0.1
"""Seconds between two reports of a task that counts bytes, besides its first and its last one."""


@dataclass(frozen=True)
class Progress:
    """The progress of a part of a load or call, as `on_progress` receives it.

    A part begins with `done` 0; `done` never falls, and the last report of the part, unless it fails, has
    `done == total`. Parts of one stage follow each other, or are nested: the tiles of one unit among the units.

    Args:
        stage: "download", "load", "encode" (the units before the loop), "denoise" or "decode"; plugins may have others.
        done: number of finished units.
        total: number of all units; None if it is unknown. That of a download grows while files begin.
        unit: what is counted: "bytes", "units" (of the pipeline), "steps", "tiles" or "pieces" (of a video).
        description: a role, the title of a unit, or a source; "" if there is none.
        cascade_stage: name of the stage, in a call of a `Cascade`.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    description: str = ""
    cascade_stage: str = ""


OnProgress = Callable[[Progress], None]
"""A function that is called with each `Progress`: in the thread of the load or call or in a thread that reads files
for it, and never in two threads at once. An exception in it ends the load or call."""


class _Reporter:
    """The callback and the `cancel` event of one load or call."""

    def __init__(self, on_progress: OnProgress | None, cancel: threading.Event | None) -> None:
        self._on_progress, self._cancel = on_progress, cancel
        self.lock = threading.RLock()
        self.error: Exception | None = None

    def raise_if_stopped(self) -> None:
        """Raise the exception that ended the load or call in another thread, or Cancelled if `cancel` is set."""
        if self.error is not None:
            raise self.error
        try:
            raise_if_set(self._cancel)
        except Cancelled as error:
            self.error = error
            raise

    def send(self, progress: Progress) -> None:
        """Call the callback; the caller holds the lock."""
        if self._on_progress is None:
            return
        try:
            self._on_progress(progress)
        except Exception as error:
            self.error = error
            raise


class Task:
    """A part of a load or call whose progress is reported. Threads may share it.

    Args:
        reporter: of the load or call; None reports nothing.
        progress: the first report.
        parent: the task around this one.
    """

    def __init__(self, reporter: _Reporter | None, progress: Progress, parent: Task | None = None) -> None:
        self._reporter, self.parent = reporter, parent
        self._now, self._sent = progress, -1.0
        self._last: Progress | None = None
        self._most: int | None = None

    @property
    def stage(self) -> str:
        """The stage of the reports."""
        return self._now.stage

    @property
    def description(self) -> str:
        """The description of the reports."""
        return self._now.description

    @property
    def is_silent(self) -> bool:
        """Whether nobody receives the reports."""
        return self._reporter is None

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units.

        Raises:
            Cancelled: the caller set `cancel`.
            Exception: the callback raised it, in this thread or another one.
        """
        self._change(done=self._now.done + count)

    def reach(self, done: int) -> None:
        """Set the number of finished units, unless it is that or larger already. Errors are those of `advance`."""
        self._change(done=done)

    def bound(self, most: int) -> None:
        """Set the largest number that units are counted up to, until it is set again or the task finishes: of a part of
        the task which may take more units than it was counted with.
        """
        self._most = most

    def expect(self, total: int) -> None:
        """Set the number of all units. Errors are those of `advance`."""
        self._change(total=total)

    def describe(self, description: str) -> None:
        """Set the description, and report it. Errors are those of `advance`."""
        self._change(description=description, at_once=True)

    def finish(self) -> None:
        """Report that all units are finished. Errors are those of `advance`."""
        self._most = None
        self._change(done=self._now.done if self._now.total is None else self._now.total, at_once=True, is_last=True)

    def _change(
        self,
        done: int | None = None,
        total: int | None = None,
        description: str | None = None,
        *,
        at_once: bool = False,
        is_last: bool = False,
    ) -> None:
        if self._reporter is None:
            return
        self._reporter.raise_if_stopped()
        with self._reporter.lock:
            now = self._now
            total = now.total if total is None else total
            done = now.done if done is None else max(done, now.done)
            done = max(min(each for each in (done, total, self._most) if each is not None), now.done)
            if is_last:
                total = done
            described = now.description if description is None else description
            self._now = Progress(now.stage, done, total, now.unit, described)
            if self._now == self._last:
                return
            if at_once or now.unit != "bytes" or done == total or time.monotonic() - self._sent >= _INTERVAL:
                self._last, self._sent = self._now, time.monotonic()
                self._reporter.send(self._now)


NO_TASK = Task(None, Progress("", 0, None, ""))
"""The task of code that reports nothing."""

_scope: ContextVar[tuple[_Reporter | None, Task]] = ContextVar("diffsynth_progress", default=(None, NO_TASK))
"""The reporter of the load or call that runs in this context, and its innermost open task."""


@contextmanager
def reporting(on_progress: OnProgress | None = None, *, cancel: threading.Event | None = None) -> Iterator[None]:
    """Context manager in which tasks report to `on_progress`, and end by `Cancelled` when `cancel` is set.

    Args:
        on_progress: see `OnProgress`; None reports nothing, also where the code around it reports.
        cancel: checked at each report.

    Raises:
        TypeError: `on_progress` is no function, or `cancel` no event.
        Exception: of `on_progress`, also where code in between raised another one because of it.
    """
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress={shown(on_progress)}: expected a function that takes a Progress")
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise TypeError(f"cancel={shown(cancel)}: expected a threading.Event")
    is_silent = on_progress is None and cancel is None
    reporter = None if is_silent else _Reporter(on_progress, cancel)
    token = _scope.set((reporter, NO_TASK))
    try:
        yield
    except BaseException as error:
        if reporter is None or reporter.error is None or reporter.error is error:
            raise
        raise reporter.error from None
    finally:
        _scope.reset(token)
        if reporter is not None:
            # Its traceback holds this frame, and so all that was loaded: a cycle that only the collector would free.
            reporter.error = None


@contextmanager
def task(stage: str, *, total: int | None, unit: str, description: str = "") -> Iterator[Task]:
    """Context manager that yields a `Task`: it reports its begin, and its end unless an exception leaves it.

    Args:
        stage, total, unit, description: see `Progress`.

    Raises:
        Cancelled: the caller set `cancel`.
        Exception: the callback raised it.
    """
    reporter, parent = _scope.get()
    if reporter is None:
        yield NO_TASK
        return
    current = Task(reporter, Progress(stage, 0, total, unit, description), parent)
    token = _scope.set((reporter, current))
    try:
        current.describe(description)
        yield current
        current.finish()
    finally:
        _scope.reset(token)


def track(items: Iterable[Item], *, total: int, unit: str) -> Iterator[Item]:
    """Yield the items, and report each one that is done as a part of the task around it: of its stage, and with its
    description. A single item is not reported.

    Args:
        items: the items.
        total: their number.
        unit: what they are; see `Progress`.

    Raises:
        Cancelled: the caller set `cancel`.
        Exception: the callback raised it.
    """
    reporter, parent = _scope.get()
    if reporter is None or parent is NO_TASK or total < 2:
        yield from items
        return
    # A generator must not change the scope: its caller would run in it.
    current = Task(reporter, Progress(parent.stage, 0, total, unit, parent.description), parent)
    current.describe(parent.description)
    for item in items:
        yield item
        current.advance()
    current.finish()


def current(stage: str) -> Task:
    """Return the innermost open `Task` of a stage in this context; one that reports nothing if there is none."""
    found = _scope.get()[1]
    while found.stage != stage and found.parent is not None:
        found = found.parent
    return found if found.stage == stage else NO_TASK


def raise_if_stopped() -> None:
    """Raise an exception if the load or call that runs in this context is to end; do nothing without one.

    Raises:
        Cancelled: the caller set `cancel`.
        Exception: the callback raised it.
    """
    reporter = _scope.get()[0]
    if reporter is not None:
        reporter.raise_if_stopped()


def raise_if_set(cancel: threading.Event | None) -> None:
    """Raise `Cancelled` if an event is set; do nothing for None.

    Raises:
        Cancelled: the event is set.
    """
    if cancel is not None and cancel.is_set():
        raise Cancelled("the caller set `cancel`; no result")
