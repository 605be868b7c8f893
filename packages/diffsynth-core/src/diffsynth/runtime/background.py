"""Calls that run in a thread of their own: awaited by `agenerate`, or followed step by step by `stream`."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from diffsynth.runtime.request import Step

_LONGEST_WAIT = 60.0
"""Seconds for which a stream that is garbage waits for its call: the thread that collects it may hold what the call
needs to end."""


class BackgroundMethods:
    """The methods of `Pipeline` and `Cascade` that run a call in a thread of its own."""

    async def agenerate(self, prompt: str | Sequence[str] = "", **arguments: Any) -> Any:
        """Make a call in a thread of its own, while the event loop goes on; return what the call returns.

        Cancelling the task sets the call's `cancel`, and the coroutine ends when the call has ended, at its next step.
        The call sees the context variables of the task. Several may run at once; see `Pipeline` for threads.

        Args:
            prompt, arguments: of the call. `on_step` is called in the thread of the call.

        Raises:
            Exception: the error of the call.
            asyncio.CancelledError: the task was cancelled.
        """
        call = _Call(self, prompt, arguments)
        call.start()
        result = asyncio.wrap_future(call.result)
        cancelled: asyncio.CancelledError | None = None
        while not result.done():
            try:
                await asyncio.wait([result])
            except asyncio.CancelledError as error:
                call.cancel.set()
                cancelled = error
        call.join()
        if cancelled is None:
            return result.result()
        result.exception()  # asyncio logs an exception that nobody reads
        raise cancelled

    def stream(self, prompt: str | Sequence[str] = "", **arguments: Any) -> CallStream:
        """Make a call in a thread of its own; return a `CallStream`, an iterator over its `Step`s and then its result.

        `*steps, image = pipe.stream("a red apple")` has all of them. Errors of the call are raised by the iterator.

        Args:
            prompt, arguments: of the call. `on_step` is called in the thread of the call, before the step is returned.
        """
        return CallStream(self, prompt, arguments)


class CallStream:
    """An iterator over the `Step`s of a call that runs meanwhile, and as last item over what the call returns; for
    `for` and `async for`.

    No step is lost: the call runs at most one step ahead of the consumer, and then waits, with whatever it holds on the
    device. The latents of a step are a copy, and its `x0` can be read at any time. Exceptions of the call are raised in
    the consumer.

    `close()`, and leaving `with` or `async with`, cancel a call that still runs and wait until it has ended. A stream
    that nothing refers to any more, as after `break`, does the same, but waits for at most 60 s; inside a coroutine use
    `async with`, which does not keep the event loop waiting. Where several processes compute together, a call cannot be
    cancelled, and closing waits for all of it.

    Args:
        call: the pipeline or cascade.
        prompt, arguments: of the call.
    """

    def __init__(self, call: Callable[..., Any], prompt: Any, arguments: Mapping[str, Any]) -> None:
        own = _Call(call, prompt, arguments)
        channel = _Channel(own, arguments.get("on_step"))
        own.arguments["on_step"] = channel.send
        self._next: Future[_Item] | None = channel.tail
        self._channel = channel
        self._finalizer = weakref.finalize(self, _stop, own, channel, _LONGEST_WAIT)
        self._stop: Callable[[], None] = lambda: _stop(own, channel, None)
        own.start(channel.end)

    def close(self) -> None:
        """Cancel the call if it runs, and wait until it has ended; later items are lost."""
        self._next = None
        if self._finalizer.detach() is not None:
            self._stop()

    async def aclose(self) -> None:
        """Do as `close()`, without keeping the event loop waiting."""
        await asyncio.to_thread(self.close)

    def __iter__(self) -> CallStream:
        return self

    def __next__(self) -> Any:
        """Return the next `Step`, or the result as the last item; wait for it."""
        if self._next is None:
            raise StopIteration
        try:
            item = self._next.result()
        except BaseException:
            self._drop_if_failed()
            raise
        return self._take(item)

    def __aiter__(self) -> CallStream:
        return self

    async def __anext__(self) -> Any:
        """Return the next `Step`, or the result as the last item; cancelling the task loses no item."""
        if self._next is None:
            raise StopAsyncIteration
        try:
            item = await asyncio.shield(asyncio.wrap_future(self._next))
        except BaseException:
            self._drop_if_failed()
            raise
        return self._take(item)

    def __enter__(self) -> CallStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> CallStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def _drop_if_failed(self) -> None:
        # Waiting may also end by Ctrl-C or a cancelled task, after which the stream goes on.
        if self._next is not None and self._next.done():
            self.close()

    def _take(self, item: _Item) -> Any:
        self._next = item.following
        self._channel.take()
        if item.following is None:
            self.close()
        return item.value


@dataclass(frozen=True)
class _Item:
    """An item of a stream, and the future of the following one; None after the last."""

    value: Any
    following: Future[_Item] | None


class _Call:
    """A call in a thread of its own.

    Args:
        call: the pipeline or cascade.
        prompt, arguments: of the call.
    """

    def __init__(self, call: Callable[..., Any], prompt: Any, arguments: Mapping[str, Any]) -> None:
        self._call, self._prompt, self.arguments = call, prompt, dict(arguments)
        given = arguments.get("cancel")
        self.cancel = _LinkedEvent(given if isinstance(given, threading.Event) else None)
        mesh = getattr(call, "mesh", None)
        is_alone = mesh is None or mesh.world.size == 1
        if is_alone and isinstance(given, threading.Event | None):  # anything else is refused by the call
            self.arguments["cancel"] = self.cancel
        self.result: Future[Any] = Future()
        self._thread: threading.Thread | None = None

    def start(self, ended: Callable[[], None] = lambda: None) -> None:
        """Start the thread, in a copy of the context; `ended` is called in it after the call."""

        def run() -> None:
            try:
                value = self._call(self._prompt, **self.arguments)
            except BaseException as error:  # SystemExit of a callback, too, belongs to the caller
                self.result.set_exception(error)
            else:
                self.result.set_result(value)
            ended()

        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(run,), name="diffsynth-call", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the call has ended, for at most `timeout` seconds; not in the thread of the call."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)


class _Channel:
    """The items of a stream, sent from the call's thread to the consumer one at a time.

    Args:
        call: the call.
        on_step: of the caller.
    """

    def __init__(self, call: _Call, on_step: Any) -> None:
        self._call, self._on_step = call, on_step
        self._changed = threading.Condition()
        self._has_room, self._is_closed = True, False
        self.tail: Future[_Item] = Future()

    def send(self, step: Step) -> None:
        """Send a step, after the consumer has taken the one before."""
        if self._on_step is not None:
            self._on_step(step)
        # The loop drops the evaluation of its own step; that of the copy keeps `x0` readable.
        kept = replace(step, latents=step.latents.clone(), evaluation=copy.copy(step.evaluation))
        with self._changed:
            self._changed.wait_for(lambda: self._has_room or self._is_closed)
            self._has_room = False
        following: Future[_Item] = Future()
        tail, self.tail = self.tail, following
        tail.set_result(_Item(kept, following))

    def end(self) -> None:
        """Send the result of the call, or its exception, which need not wait for room."""
        result = self._call.result
        if (error := result.exception()) is not None:
            self.tail.set_exception(error)
        else:
            self.tail.set_result(_Item(result.result(), None))

    def take(self) -> None:
        """Make room for the next step."""
        with self._changed:
            self._has_room = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let the call go on without a consumer."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class _LinkedEvent(threading.Event):
    """An event that is set, too, if another one is."""

    def __init__(self, other: threading.Event | None = None) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or (self._other is not None and self._other.is_set())


def _stop(call: _Call, channel: _Channel, timeout: float | None) -> None:
    """Cancel a call, and wait until it has ended."""
    call.cancel.set()
    channel.close()
    call.join(timeout)
