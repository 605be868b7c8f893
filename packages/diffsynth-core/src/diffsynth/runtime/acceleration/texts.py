"""Settings as a text, `name=value,name=value`, for the command line and for records of pictures."""

from __future__ import annotations

import ast
from collections.abc import Collection
from typing import Any

from diffsynth.errors import did_you_mean


def settings_in(text: str, known: Collection[str], argument: str) -> dict[str, Any]:
    """The settings of a text; values are Python's literals where they are such, else texts.

    Args:
        text: empty for none.
        known: names that may stand there.
        argument: where it stands, for messages: "step_cache='taylor:interval=3'".

    Raises:
        ValueError: an unknown name, or a part that is not `name=value`.
    """
    return dict(_setting(part, known, argument) for part in text.split(",") if part)


def _setting(part: str, known: Collection[str], argument: str) -> tuple[str, Any]:
    name, equals, text = part.partition("=")
    if not equals or name not in known:
        raise ValueError(
            f"{argument}: {part!r}{did_you_mean(name, known)}; expected setting=value with one of {', '.join(known)}"
        )
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text
