"""Copies of declarations that hold plain values alone and share none of them with the plugin. Imports no torch.

The catalog of one program holds the declarations of all plugins: they are sorted, compared, shown and written as JSON
together, so an object with methods of its own, or a dict that changes later, would fail for all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from diffsynth import spec
from diffsynth.errors import shown

_DEEPEST = 16
_LARGEST_INTEGER = 2**63

_Copier = Callable[[Any], Any]
"""Function that returns a copy of a value; raises `_Misfit`."""


class _Misfit(Exception):
    """A value that is no plain one: the error to raise, whose text follows the value's place in the declaration."""

    def __init__(self, kind: type[Exception], text: str) -> None:
        super().__init__(text)
        self.kind, self.text, self.place = kind, text, ""

    def inside(self, place: str) -> _Misfit:
        self.place = f"{place}{self.place}"
        return self


def plain_copy(declaration: Any) -> Any:
    """Return an equal declaration that shares no mutable value with the one that is given; lists in place of tuples
    become tuples.

    Raises:
        TypeError: a field holds a value of another type than is declared, or in a mapping one that JSON does not have.
            Subclasses of those types are refused, too, because their methods may do anything.
        ValueError: a number is not finite or has more than 64 bits, a text has lone surrogates, or mappings and lists
            are nested in more than 16 levels.
    """
    try:
        return _copy(declaration)
    except _Misfit as error:
        name = getattr(declaration, "name", "")
        prefix = f"{name!r}: " if type(name) is str and name else ""
        place = error.place if len(error.place) <= 80 else f"{error.place[:77]}..."
        raise error.kind(f"{prefix}{place} is {error.text}") from None


def _copy(declaration: Any) -> Any:
    copied = object.__new__(type(declaration))
    for name, copier in _copiers(type(declaration)):  # type: ignore[arg-type]
        try:
            object.__setattr__(copied, name, copier(getattr(declaration, name)))
        except _Misfit as error:
            raise error.inside(name) from None
    return copied


@functools.cache
def _copiers(kind: type) -> list[tuple[str, _Copier]]:
    return [(field.name, _COPIERS[str(field.type)]) for field in fields(kind)]


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _Misfit(TypeError, f"{shown(value)}, a {type(value).__name__}; expected a str")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _Misfit(ValueError, f"{shown(value)}, which has a lone surrogate; expected a text in UTF-8")
    return value


def _boolean(value: Any) -> bool:
    if value is not True and value is not False:
        raise _Misfit(TypeError, f"{shown(value)}; expected True or False")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise _Misfit(TypeError, f"{shown(value)}; expected an integer")
    if not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        raise _Misfit(ValueError, f"an integer of {value.bit_length()} bits; expected at most 64")
    return value


def _number(value: Any) -> float:
    if type(value) is not float:
        return _integer(value)
    if not math.isfinite(value):
        raise _Misfit(ValueError, f"{value}; expected a finite number")
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a copy of a value of the types that JSON has."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _text(value)
    if kind is float or kind is int:
        return _number(value)
    if kind not in (list, tuple, dict, MappingProxyType):
        raise _Misfit(
            TypeError,
            f"{shown(value)}, a {kind.__name__}; expected a str, a finite number, a bool, None, or a list or dict of "
            "those",
        )
    if depth == _DEEPEST:
        raise _Misfit(ValueError, f"nested in more than {_DEEPEST} levels")
    deeper = functools.partial(_plain, depth=depth + 1)
    return kind(_items(value, deeper)) if kind is list or kind is tuple else _entries(value, deeper)


def _items(values: Any, copier: _Copier) -> list[Any]:
    copies: list[Any] = []
    try:
        for each in values:
            copies.append(copier(each))
    except _Misfit as error:
        raise error.inside(f"[{len(copies)}]") from None
    return copies


def _entries(values: Any, copier: _Copier) -> dict[str, Any]:
    copies: dict[str, Any] = {}
    for key, each in values.items():
        if type(key) is not str:
            raise _Misfit(TypeError, f"a dict with the key {shown(key)}; expected texts as keys")
        try:
            copies[_text(key)] = copier(each)
        except _Misfit as error:
            raise error.inside(f"[{key!r}]") from None
    return copies


def _tuple_of(copier: _Copier) -> _Copier:
    def copy(value: Any) -> Any:
        if type(value) is str:
            raise _Misfit(TypeError, f"the text {shown(value)}, expected a tuple")
        if type(value) not in (tuple, list):
            raise _Misfit(TypeError, f"{shown(value)}, expected a tuple")
        return tuple(_items(value, copier))

    return copy


def _mapping_of(copier: _Copier) -> _Copier:
    def copy(value: Any) -> Any:
        if type(value) not in (dict, MappingProxyType):
            raise _Misfit(TypeError, f"{shown(value)}, expected a mapping, a dict")
        return _entries(value, copier)

    return copy


def _instance_of(expected: type) -> _Copier:
    def copy(value: Any) -> Any:
        if type(value) is not expected:
            raise _Misfit(TypeError, f"{shown(value)}, expected {expected.__name__}")
        try:
            return _copy(value)
        except _Misfit as error:
            raise error.inside(".") from None

    return copy


def _or_none(copier: _Copier) -> _Copier:
    return lambda value: None if value is None else copier(value)


_COPIERS: dict[str, _Copier] = {
    "str": _text,
    "str | None": _or_none(_text),
    "bool": _boolean,
    "int": _integer,
    "float | None": _or_none(_number),
    "tuple[str, ...]": _tuple_of(_text),
    "tuple[str, ...] | None": _or_none(_tuple_of(_text)),
    "tuple[float, ...]": _tuple_of(_number),
    "tuple[LoRASpelling, ...]": _tuple_of(_instance_of(spec.LoRASpelling)),
    "TeaCacheSpec | None": _or_none(_instance_of(spec.TeaCacheSpec)),
    "Mapping[str, Any]": _mapping_of(_plain),
    "Mapping[str, str]": _mapping_of(_text),
    "Mapping[str, Mapping[str, Any]]": _mapping_of(_mapping_of(_plain)),
    "Mapping[str, tuple[str, ...]]": _mapping_of(_tuple_of(_text)),
}
"""Annotation of a field -> function that copies its value. A test holds them to the fields of `spec`."""
