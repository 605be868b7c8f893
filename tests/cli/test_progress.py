"""The progress line of commands on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from diffsynth.cli.progress import amount, progress_line
from diffsynth.core.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_a_terminal_shows_the_last_report(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress_line("loading z-image-nano") as show:
        show(Progress("load", 3 * 2**20, 6 * 2**20, "bytes", "dit"))
    shown = terminal.getvalue()
    assert "load dit" in shown
    assert "3.0 of 6.0 MiB" in shown


def test_nothing_is_shown_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress_line("loading") as show:
        assert show is None
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((3, 8, "steps"), "3 of 8 steps"),
        ((3, None, "tiles"), "3 tiles"),
        ((512, 2048, "bytes"), "0.5 of 2.0 KiB"),
        ((3 * 2**29, 6 * 2**30, "bytes"), "1.5 of 6.0 GiB"),
        ((2**20, None, "bytes"), "1.0 MiB"),
        ((0, 0, "bytes"), "0.0 of 0.0 KiB"),
    ],
)
def test_amounts(given, expected):
    done, total, unit = given
    assert amount(Progress("load", done, total, unit)) == expected
