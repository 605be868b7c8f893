"""Calls that a loop makes again and again with arguments that look alike: a rehearsal makes each of them once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Caller = Callable[..., Any]
"""Called with a function and its arguments; gives what the function would give."""

_caller: ContextVar[Caller | None] = ContextVar("diffsynth_repeats_caller", default=None)


def repeated(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, and nothing else, in a run.

    A rehearsal on the meta device does not make a call that looks like an earlier one: it counts its operations and its
    memory again and gives tensors of the same shapes. So a plan of a video takes as long as one tile of each size.

    Args:
        function: one object for all the calls, or a bound method of one; one made in the loop never repeats. All it
            does is what it returns and what it changes in its arguments, and it asks for no values of tensors.
        arguments: tensors, plain values, lists, tuples and dicts of those, and objects with attributes of that kind,
            such as a cache of earlier frames. Tensors in attributes belong to their object alone.
    """
    caller = _caller.get()
    return function(*arguments) if caller is None else caller(function, *arguments)


@contextmanager
def made_by(caller: Caller) -> Iterator[None]:
    """Leave repeated calls to `caller`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
