"""Output to the terminal in which control characters, which may come from a file, are shown as escapes: loggers, and
the streams of the command line. `errors.DiffsynthError` does the same for messages of errors.

A stream that is closed, or a pipe that nobody reads any more, takes no output and ends no command.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from diffsynth.errors import printable

_MOVES = re.compile(r"\r|(?:\x1b\[A)+\Z")
"""Texts that `tqdm` writes to move its bars: a carriage return at the start of a text, or a text that only moves up."""


def module_logger(name: str) -> logging.Logger:
    """Return the `logging.Logger` of a module, whose messages and tracebacks have control characters as escapes.

    Args:
        name: `__name__` of the module.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_escape)  # added once: a logger knows its filters
    return logger


class OutputFailed(Exception):
    """Raised when standard output cannot be written, such as to a full disk."""


class EscapingStream:
    """Text stream that writes to another, control characters as escapes; all else is that of the other stream.

    Once a write fails, further output is dropped.

    Args:
        terminal: the other stream, such as `sys.stderr`; None is a closed one, whose output is dropped.
        required: whether the output is the result of a command. A failed write to a disk then raises `OutputFailed`.
    """

    def __init__(self, terminal: TextIO | None, *, required: bool = False) -> None:
        self.terminal = open(os.devnull, "w", encoding="utf-8") if terminal is None else terminal  # noqa: SIM115
        self._required = required
        self._failure = ""

    def write(self, text: str) -> int:
        """Write a text and return its length. A carriage return at the start is written as it is, for progress bars.

        Raises:
            OutputFailed: the output is required, and cannot be written for another reason than a closed pipe.
        """
        kept = _MOVES.match(text)
        start = kept.end() if kept else 0
        with self._dropped_if_it_fails():
            self.terminal.write(text[:start] + encodable(printable(text[start:]), self.terminal))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered.

        Raises:
            OutputFailed: as for `write`.
        """
        with self._dropped_if_it_fails():
            self.terminal.flush()
        if self._failure:  # also where the error of a write was caught by a library
            raise OutputFailed(self._failure)

    @contextmanager
    def _dropped_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            failed, self.terminal = self.terminal, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            with suppress(OSError, ValueError):  # the interpreter writes what is buffered there at its end
                os.dup2(self.terminal.fileno(), failed.fileno())
            if self._required and not isinstance(error, BrokenPipeError):
                self._failure = f"standard output cannot be written: {error.strerror or error}"
                raise OutputFailed(self._failure) from error

    def writelines(self, lines: list[str]) -> None:
        """Write each of the texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


@contextmanager
def escaping_output() -> Iterator[None]:
    """Context manager that makes `sys.stdout` and `sys.stderr` an `EscapingStream` of what they were."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (  # type: ignore[assignment]
        EscapingStream(stream, required=required) for stream, required in zip(before, (True, False), strict=True)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class ThreadStream:
    """Text stream that is one stream in the thread that made it, and another one in all others.

    Args:
        own: stream of this thread.
        others: stream of the other threads.
    """

    def __init__(self, own: TextIO, others: TextIO) -> None:
        self._own, self._others, self._thread = own, others, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own if threading.get_ident() == self._thread else self._others, name)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Context manager in which this thread's output to `sys.stdout` goes to `sys.stderr`; that of other threads does
    not.
    """
    before = sys.stdout
    if before is not None and sys.stderr is not None:
        sys.stdout = ThreadStream(sys.stderr, before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout = before


@contextmanager
def results_on_stdout() -> Iterator[list[str]]:
    """Context manager for a program whose standard output holds results alone: all that is written to it meanwhile, by
    C code and child processes too, goes to standard error. It yields a list; its texts are written at the end.

    What the C library buffers is written when the process ends, and so is not caught.
    """
    texts: list[str] = []
    stdout = sys.stdout
    stdout.flush()
    kept = None
    with suppress(OSError):
        kept = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield texts
    finally:
        sys.stdout = stdout
        if kept is not None:
            with suppress(AttributeError, OSError, ValueError):  # a stream that is None or closed
                sys.__stdout__.flush()  # type: ignore[union-attr]
            os.dup2(kept, 1)
            os.close(kept)
        stdout.writelines(texts)


def open_closed_descriptors() -> None:
    """Open the null device as those of standard input, output and error that are closed.

    A file that is opened later would get the number of a closed one, and what a library prints would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def encodable(text: str, stream: TextIO) -> str:
    """Return a text with escapes for the characters that the encoding of a stream lacks, such as Chinese ones in the
    code page of a console or a pipe on Windows.
    """
    encoding = getattr(stream, "encoding", None)
    if text.isascii() or not encoding:
        return text
    return text.encode(encoding, "backslashreplace").decode(encoding)


def unescaped(stream: TextIO) -> TextIO:
    """Return the stream that an `EscapingStream` writes to, for a progress bar of rich; any other stream itself."""
    return stream.terminal if isinstance(stream, EscapingStream) else stream


def _escape(record: logging.LogRecord) -> bool:
    try:
        message = record.getMessage()
    except Exception:  # arguments that do not fit the message: the handler reports it
        return True
    if (safe := printable(message)) != message:
        record.msg, record.args = safe, None
    if record.exc_info and not record.exc_text:
        text = logging.Formatter().formatException(record.exc_info)
        if (safe := printable(text)) != text:
            record.exc_text = safe
    return True
