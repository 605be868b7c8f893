"""Which backend a piece of code or a module wants: `use_attention`. Nothing global is changed."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import nn

_wanted: ContextVar[tuple[tuple[int, str], ...]] = ContextVar("diffsynth_attention", default=())
"""Who wants which backend, by thread and by task; the innermost is last."""

_innermost: ContextVar[str | None] = ContextVar("diffsynth_attention_name", default=None)
"""The backend of the last of them: what compiled code looks at, so that it serves the next choice of the same name."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.innermost: str | None = None


_of_thread = _OfThread()
"""The same by thread alone, for compiled code of torch before 2.15, whose graphs break where a ContextVar is read."""

_is_context_traced = torch.__version__ >= (2, 15)

_is_used = False
"""Whether anybody ever chose. Until then compiled code does not look at the context."""


class use_attention:  # noqa: N801 - it is used like a function
    """The backend of every `attention()` call that names none, within a `with` block or within a module's forward.

        with use_attention("naive"):
            image = pipe(prompt)

        choice = use_attention("sdpa", module=pipe.vae)  # from here on, whoever calls it
        choice.remove()

    The innermost choice wins; `backend=` of a call comes before it, DIFFSYNTH_ATTENTION_IMPLEMENTATION behind. A
    choice holds for the thread or task that made it (in code compiled by torch before 2.15, for the thread alone); one
    for a module holds in every thread that calls the module.

    Args:
        backend: a name of `available_backends()`, or `auto`.
        module: choose for this module alone, at once, until `remove()` or the end of the `with` block. What it calls
            is included; what another part of the program calls at the same time is not.

    Raises:
        ValueError: unknown backend, or an attempt to enter it twice at once.
    """

    def __init__(self, backend: str, *, module: nn.Module | None = None) -> None:
        from diffsynth.core.attention.select import check_known  # select reads this module's choices

        check_known(backend)
        global _is_used
        _is_used = True
        self._entry = (id(self), backend)
        self._is_entered = False
        self._hooks: list[Any] = []
        if module is not None:
            # always_call: also where forward raises.
            self._hooks = [
                module.register_forward_pre_hook(lambda *_: self._begin()),
                module.register_forward_hook(lambda *_: self._end(), always_call=True),
            ]
        self._is_for_module = module is not None

    def remove(self) -> None:
        """End the choice for a module; a second time does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> use_attention:
        if self._is_entered:
            raise ValueError(f"use_attention({self._entry[1]!r}) is entered already; make another one")
        self._is_entered = True
        if not self._is_for_module:
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_entered = False
        if self._is_for_module:
            self.remove()
        else:
            self._end()

    def _begin(self) -> None:
        _want((*_wanted.get(), self._entry))

    def _end(self) -> None:
        # Another hook's error may come before ours began: then there is nothing to end.
        entries = _wanted.get()
        if entries and entries[-1] == self._entry:
            _want(entries[:-1])


class restored_choice:  # noqa: N801
    """The choices of the moment it is made, again: for work that runs later or in another thread, such as a
    checkpointed block's second forward in the backward pass."""

    def __init__(self) -> None:
        self._entries = _wanted.get()

    def __enter__(self) -> None:
        self._before = _wanted.get()
        _want(self._entries)

    def __exit__(self, *_: object) -> None:
        _want(self._before)


def chosen() -> str | None:
    """The innermost choice here, or None."""
    if not _is_used:
        return None
    return _innermost.get() if _is_context_traced or not torch.compiler.is_compiling() else _of_thread.innermost


def _want(entries: tuple[tuple[int, str], ...]) -> None:
    name = entries[-1][1] if entries else None
    _wanted.set(entries)
    _innermost.set(name)
    _of_thread.innermost = name
