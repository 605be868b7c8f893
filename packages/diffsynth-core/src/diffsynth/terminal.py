"""Output to the terminal in which control characters, which may come from a file, are shown as escapes: loggers, and
the streams of the command line. `errors.DiffsynthError` does the same for messages of errors.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


class EscapingStream:
    """Text stream that writes to another, control characters as escapes; all else is that of the other stream.

    Args:
        terminal: the other stream, such as `sys.stderr`.
    """

    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal

    def write(self, text: str) -> int:
        """Write a text and return its length. A carriage return at the start is written as it is, for progress bars."""
        kept = _MOVES.match(text)
        start = kept.end() if kept else 0
        self.terminal.write(text[:start] + encodable(printable(text[start:]), self.terminal))
        return len(text)

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
    sys.stdout, sys.stderr = (EscapingStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


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
