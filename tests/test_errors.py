"""Texts in messages: short, and without characters that a terminal obeys."""

import pickle

import pytest

from diffsynth.errors import CorruptFile, did_you_mean, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07x", r"\x1b]0;owned\x07x"),
        ("a\rb\x9b31m\x00", r"a\rb\x9b31m\x00"),
        ("abc\u202egpj.exe", r"abc\u202egpj.exe"),
        ("half \ud83d of a pair", r"half \ud83d of a pair"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("日本語 é 😀", "日本語 é 😀"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown
    assert str(CorruptFile(f"{text} is damaged")) == f"{shown} is damaged"
    assert shortened([text, "b"], 1) == f"{shown} and 1 more"


def test_errors_survive_a_pickle():
    assert str(pickle.loads(pickle.dumps(CorruptFile("a \x1b b")))) == r"a \x1b b"


def test_long_items_are_cut():
    assert shortened(["x" * 5000]) == "x" * 197 + "..."


def test_the_nearest_of_many_names_is_looked_for_in_bounded_time():
    assert did_you_mean("layer.3", (f"layer.{i}" for i in range(10**9)))
