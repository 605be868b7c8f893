"""Descriptions and ranges of arguments, read from docstrings.

Each argument is documented once, in an "Args:" section: those of the loop in `LoopArguments`, a family's own in the
`TypedDict`s of its `arguments.py` and of its features, those of a unit without such a type in the unit's docstring, and
`prompt` in `Pipeline.__call__`. A range is written as "at least 1", "at most 4", "above 0" or "in (0, 1]".
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any

from diffsynth.runtime.composition import compose
from diffsynth.runtime.request import LoopArguments
from diffsynth.runtime.unit import Program

_SECTION = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", flags=re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^ {4}(\w+(?:,\s+\w+)*): (.+?)(?=^ {4}\w|\Z)", flags=re.MULTILINE | re.DOTALL)

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOUND = re.compile(rf"\b(at least|at most|above|below) {_NUMBER}")
_INTERVAL = re.compile(rf"\bin ([\[(]){_NUMBER}, {_NUMBER}([\])])")
_KEYWORD = {
    "at least": "minimum",
    "[": "minimum",
    "above": "exclusiveMinimum",
    "(": "exclusiveMinimum",
    "at most": "maximum",
    "]": "maximum",
    "below": "exclusiveMaximum",
    ")": "exclusiveMaximum",
}


def documented(cls: type, program: Program) -> dict[str, str]:
    """Return a dict argument -> description; a family's descriptions have precedence over those of shared units.

    Args:
        cls: the pipeline class.
        program: its units.
    """
    found: dict[str, str] = {}
    added = [feature.arguments for feature in compose(cls).features if feature.arguments is not None]
    functions = [step.function for step in (*program.units, *program.outputs)]
    for owner in (*cls.__mro__, *_typed_dicts(cls), *added, LoopArguments, *functions):
        text = vars(owner)["__call__"].__doc__ if "__call__" in vars(owner) else owner.__doc__
        for name, description in _entries(text or ""):
            found.setdefault(name, description)
    return found


def with_range(schema: dict[str, Any], text: str) -> dict[str, Any]:
    """Return `schema` with the limits that `text` states, such as "at least 1" -> `"minimum": 1`, where it is of a
    number.
    """
    if "anyOf" in schema:
        return {**schema, "anyOf": [with_range(one, text) for one in schema["anyOf"]]}
    if schema.get("type") not in ("integer", "number"):
        return schema
    return schema | {_KEYWORD[words]: limit for words, limit in _bounds(text)}


def _bounds(text: str) -> Iterator[tuple[str, int | float]]:
    for words, number in _BOUND.findall(text):
        yield words, _number(number)
    for opening, low, high, closing in _INTERVAL.findall(text):
        yield opening, _number(low)
        yield closing, _number(high)


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _entries(docstring: str) -> Iterator[tuple[str, str]]:
    for section in _SECTION.findall(inspect.cleandoc(docstring)):
        for names, text in _ENTRY.findall(section):
            for name in re.split(r",\s+", names):
                yield name, " ".join(text.split())


def _typed_dicts(cls: type) -> Iterator[Any]:
    """Yield the `TypedDict` classes that annotate the `**arguments` of `__call__` in a class and its bases."""
    for base in cls.__mro__:
        function = vars(base).get("__call__")
        annotation = getattr(function, "__annotations__", {}).get("arguments")
        if isinstance(annotation, str) and annotation.startswith("Unpack["):
            # A subclass without a `__call__` of its own has a copy of its base's, made in another module.
            yield from _with_groups(typing.get_args(eval(annotation, inspect.unwrap(function).__globals__))[0])


def _with_groups(whole: Any) -> Iterator[Any]:
    """Yield `whole`, a `TypedDict` class, then those of its module whose fields are all among its own.

    Python 3.11 does not record base classes of a `TypedDict`.
    """
    yield whole
    for kind in vars(sys.modules[whole.__module__]).values():
        if (
            typing.is_typeddict(kind)
            and kind is not whole
            and kind.__annotations__.items() <= whole.__annotations__.items()
        ):
            yield kind
