"""The text form of settings, `name=value,name=value`, for the command line and for records of images."""

from __future__ import annotations

import ast
from collections.abc import Collection
from typing import Any

from diffsynth.errors import did_you_mean


def parse_settings(text: str, known: Collection[str], *, argument: str) -> dict[str, Any]:
    """Return a dict name -> value of a text: "a=2,b=x" -> `{"a": 2, "b": "x"}`; no Python literal, so "x" stays text.

    Args:
        text: empty for no settings.
        known: names of the settings that exist.
        argument: the whole argument, for messages: "step_cache='taylor:interval=3'".

    Raises:
        ValueError: an unknown name, or an entry that is not `name=value`.
    """
    settings: dict[str, Any] = {}
    for entry in filter(None, text.split(",")):
        name, equals, value = entry.partition("=")
        if not equals or name not in known:
            expected = f"setting=value with one of {', '.join(known)}" if known else "no settings"
            raise ValueError(f"{argument}: {entry!r}{did_you_mean(name, known)}; expected {expected}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings
