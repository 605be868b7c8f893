"""The state of the process while a plugin's code runs: what it changed is named and set back, and an interrupt by the
user is told from one that the plugin raises. Imports no torch.

Not noticed: changed contents of mutable objects of ours, other libraries' functions, and what a thread does later.
"""

from __future__ import annotations

import builtins
import json
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

_ATTRIBUTES: tuple[tuple[Any, str], ...] = (
    *((sys, name) for name in ("stdin", "stdout", "stderr", "excepthook", "displayhook", "unraisablehook")),
    (threading, "excepthook"),
)
"""Modules and their attributes that are compared by identity."""

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM") if hasattr(signal, name)]
_LISTS: tuple[tuple[Any, str], ...] = (
    (sys, "path"),
    (sys, "meta_path"),
    (sys, "path_hooks"),
    (warnings, "filters"),
    (logging.root, "handlers"),
)
_VALUES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the level of the root logger": (lambda: logging.root.level, logging.root.setLevel),
    "the locale": (lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)),
}
"""Name -> (function that reads a value, function that sets it)."""

_MISSING = object()


class ProcessState:
    """A snapshot of the process: settings of the interpreter, and the functions and classes of diffsynth's modules."""

    def __init__(self) -> None:
        self._contents: dict[str, tuple[ModuleType, dict[str, Any]]] = {}
        self._classes: dict[type, dict[str, Any]] = {}
        self.update()

    def update(self) -> None:
        """Take the snapshot again; modules that are in it are not read again."""
        self._cwd = _cwd()
        self._environment = dict(os.environ)
        self._attributes = [getattr(owner, name, None) for owner, name in _ATTRIBUTES]
        self._lists = [(getattr(owner, name), list(getattr(owner, name))) for owner, name in _LISTS]
        self._values = {name: read() for name, (read, _) in _VALUES.items()}
        self._signals = [signal.getsignal(each) for each in _SIGNALS]
        self._threads = set(threading.enumerate())
        for name, module in list(sys.modules.items()):
            ours = name.partition(".")[0].startswith("diffsynth") or module in (builtins, json, os)
            if ours and name not in self._contents and isinstance(module, ModuleType):
                self._contents[name] = module, dict(vars(module))
                for value in list(vars(module).values()):
                    if isinstance(value, type) and value.__module__ == name and name.startswith("diffsynth"):
                        self._classes[value] = dict(vars(value))

    def set_back(self) -> list[str]:
        """Return a list of what differs from the snapshot, in words, and set it back; threads cannot be ended."""
        changed = [*self._settings(), *self._functions()]
        started = set(threading.enumerate()) - self._threads
        changed += [f"threads that it started ({', '.join(sorted(each.name for each in started))})"] if started else []
        return changed

    def _settings(self) -> Iterator[str]:
        if self._cwd is not None and _cwd() != self._cwd:
            with suppress(OSError):
                os.chdir(self._cwd)
            yield "the working directory"
        if os.environ != self._environment:
            names = {*os.environ, *self._environment}
            wrong = sorted(name for name in names if os.environ.get(name) != self._environment.get(name))
            for name in wrong:
                if name in self._environment:
                    os.environ[name] = self._environment[name]
                else:
                    del os.environ[name]
            yield f"environment variables ({', '.join(wrong)})"
        for (owner, name), value in zip(_ATTRIBUTES, self._attributes, strict=True):
            if getattr(owner, name, None) is not value:
                setattr(owner, name, value)
                yield f"{owner.__name__}.{name}"
        for (owner, name), (the_list, content) in zip(_LISTS, self._lists, strict=True):
            now = getattr(owner, name, None)
            if now is not the_list or len(now) != len(content) or any(map(_is_not, now, content)):
                the_list[:] = content
                setattr(owner, name, the_list)
                yield f"{getattr(owner, '__name__', 'logging.root')}.{name}"
        for name, (read, write) in _VALUES.items():
            if read() != self._values[name]:
                write(self._values[name])
                yield name
        for number, handler in zip(_SIGNALS, self._signals, strict=True):
            if signal.getsignal(number) is not handler and signal.getsignal(number) != handler:
                with suppress(ValueError, TypeError):  # not in the main thread; or a handler that Python did not set
                    signal.signal(number, handler)
                yield f"the handler of {number.name}"

    def _functions(self) -> Iterator[str]:
        for name, (module, content) in self._contents.items():
            if sys.modules.get(name) is not module:
                sys.modules[name] = module
                yield f"sys.modules[{name!r}]"
            now = vars(module)
            for attribute in [each for each, value in content.items() if now.get(each, _MISSING) is not value]:
                if callable(value := content[attribute]) or isinstance(value, ModuleType):
                    now[attribute] = value
                    yield f"{name}.{attribute}"
        for owner, content in self._classes.items():
            own = vars(owner)
            for attribute in [each for each, value in content.items() if own.get(each, _MISSING) is not value]:
                if callable(content[attribute]) or isinstance(content[attribute], property | classmethod):
                    setattr(owner, attribute, content[attribute])
                    yield f"{owner.__module__}.{owner.__qualname__}.{attribute}"
            for attribute in [each for each in own if each not in content and callable(own[each])]:
                delattr(owner, attribute)
                yield f"{owner.__module__}.{owner.__qualname__}.{attribute}"


class Interrupts:
    """Whether a KeyboardInterrupt is the user's: one that SIGINT raised, and not the code that runs.

    Args:
        pressed: whether SIGINT arrived.
        raises: whether the handler of SIGINT raises KeyboardInterrupt, which the code may have caught.
    """

    def __init__(self) -> None:
        self.pressed = False
        self.raises = False


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Context manager that notes SIGINT and then calls its handler; it yields the `Interrupts`.

    Outside the main thread, and where the handler is not one of Python, no SIGINT raises KeyboardInterrupt.
    """
    found = Interrupts()
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield found
        return

    def note(number: int, frame: Any) -> Any:
        found.pressed = True
        found.raises = handler is signal.default_int_handler
        return handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, handler)


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # the folder was deleted
        return None


def _is_not(one: Any, other: Any) -> bool:
    return one is not other and not (type(one) is str and one == other)
