"""Calls that a loop repeats with arguments of the same shapes: a plan makes one of them and counts the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Caller = Callable[..., Any]
"""Called with a function and its arguments; returns a result in place of the function's."""

_caller: ContextVar[Caller | None] = ContextVar("diffsynth_repeats_caller", default=None)


def repeated(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `function(*arguments)`; while a plan is made (a run on meta), equal calls run once and count
    each time.

    A plan runs the code on the meta device. There a call with arguments of the same shapes and values as an earlier
    one is not made: its operations and its memory are counted again, and new tensors of the same shapes are returned.
    So a plan of a video takes as long as one tile of each size.

    Args:
        function: the same object for all calls, or a bound method of one object; one that is made in the loop never
            repeats. It may return tensors and change attributes of its arguments, nothing else, and it may not read
            values of tensors.
        arguments: tensors, plain values, lists, tuples and dicts of those, and objects with attributes of that kind,
            such as a cache of earlier frames. Tensors in attributes belong to their object alone.
    """
    caller = _caller.get()
    return function(*arguments) if caller is None else caller(function, *arguments)


@contextmanager
def intercepted_by(caller: Caller) -> Iterator[None]:
    """Context manager in which `repeated(function, *arguments)` returns `caller(function, *arguments)`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
