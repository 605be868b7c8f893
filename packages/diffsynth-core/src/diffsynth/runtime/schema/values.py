"""Conversion of JSON to the arguments of a call, checked against the schema of the call."""

from __future__ import annotations

import base64
import binascii
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from diffsynth.core.data.image import decode_image
from diffsynth.errors import CorruptFile, did_you_mean, shown
from diffsynth.runtime.synonyms import which_is_meant
from diffsynth.spec import resolve

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "boolean": bool,
    "integer": (int, float),
    "number": (int, float),
    "null": type(None),
    "array": list,
    "object": dict,
}
_WORDS = {
    "string": "text",
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "array": "a list",
}
BOUNDS = {
    "minimum": ("at least", lambda value, limit: value >= limit),
    "exclusiveMinimum": ("above", lambda value, limit: value > limit),
    "maximum": ("at most", lambda value, limit: value <= limit),
    "exclusiveMaximum": ("below", lambda value, limit: value < limit),
}
"""Keyword of JSON Schema -> words for it, and a function of a value and the limit: whether the value is within."""


SIZE_LIMITS = "x-diffsynth-size-limits"
"""The keyword of the memory of each stage by size, see `diffsynth.runtime.size_limits.SizeLimits`."""

OpenFile = Callable[[str], Any]
"""Function from a path to a PIL image, or to a sequence of images, such as `VideoData`."""


class _Unfit(Exception):
    """A value that does not fit a schema."""


def arguments_from_json(
    schema: Mapping[str, Any], values: Mapping[str, Any], *, open_file: OpenFile | None = None
) -> dict[str, Any]:
    """Return a dict argument -> value from a JSON object, checked: base64 images become PIL images, objects
    dataclasses, whole floats ints where `schema` says integer; defaults are not filled in.

    Args:
        schema: from `Pipeline.schema()`, in this process or another of the same installation.
        values: a JSON object: argument -> value.
        open_file: function that opens a text in the place of an image or of a list of images as the path of a file; it
            returns a PIL image, or a sequence of images, and its exceptions are passed on. None decodes images from PNG
            in base64, as an app that takes requests of others must do.

    Raises:
        TypeError: `values` is no object, or has an argument that is unknown or that JSON cannot hold.
        ValueError: a value of a wrong type or out of range.
        NotEnoughMemory: a size that does not fit, if the schema has the largest sizes.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"arguments are {values!r:.80}; expected a JSON object of names and values")
    arguments = {}
    for name, value in values.items():
        if name not in schema["properties"]:
            raise TypeError(_unknown(name, schema))
        wanted = schema["properties"][name]
        try:
            arguments[name] = _parse(wanted, value, open_file)
        except _Unfit as error:
            reason = f" ({error})" if str(error) else ""
            image = "a PNG image in base64" if open_file is None else "the path of an image"
            raise ValueError(f"{name}={shown(value)}: expected {_expected(wanted, image)}{reason}") from None
    if SIZE_LIMITS in schema:
        from diffsynth.runtime.size_limits import SizeLimits

        SizeLimits.from_json(schema[SIZE_LIMITS]).check(arguments)
    return arguments


def bounds_text(schema: Mapping[str, Any]) -> str:
    """Return the limits of a number in a schema as text, such as "above 0 and at most 1"; "" without limits."""
    return " and ".join(f"{words} {schema[keyword]}" for keyword, (words, _) in BOUNDS.items() if keyword in schema)


def _unknown(name: str, schema: Mapping[str, Any]) -> str:
    if name in schema.get("x-diffsynth-host-only", {}):
        return f"argument {name!r} can only be given by a program in the same process, not as JSON. Leave it out"
    known, instead = schema["properties"], schema.get("x-diffsynth-other-arguments", {})
    if name in instead:
        return f"unknown argument {name!r}: {instead[name]}"
    return f"unknown argument {name!r}{which_is_meant(name, known)} {schema['title']} takes: {', '.join(known)}"


def _parse(schema: Mapping[str, Any], value: Any, open_file: OpenFile | None) -> Any:
    if "anyOf" in schema:
        return _any_of(schema["anyOf"], value, open_file)
    if "enum" in schema:
        if not any(value == one and type(value) is type(one) for one in schema["enum"]):
            raise _Unfit
        return _construct(schema, value)
    kind = schema.get("type")
    if kind is None:
        return value
    if open_file is not None and isinstance(value, str) and (_is_image(schema) or _is_image(schema.get("items", {}))):
        return _opened(value, open_file, several=kind == "array")
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise _Unfit
    if kind in ("integer", "number"):
        return _number(schema, value)
    if kind == "array":
        return _array(schema, value, open_file)
    if kind == "object":
        return _object(schema, value, open_file)
    return _image(value) if _is_image(schema) else value


def _any_of(choices: list[Mapping[str, Any]], value: Any, open_file: OpenFile | None) -> Any:
    reasons = []
    for choice in choices:
        try:
            return _parse(choice, value, open_file)
        except _Unfit as error:
            reasons.append(str(error))
    raise _Unfit("; ".join(filter(None, reasons)))


def _number(schema: Mapping[str, Any], value: int | float) -> int | float:
    if not math.isfinite(value):  # Python's json accepts NaN, which is no JSON number
        raise _Unfit
    if schema["type"] == "integer":
        if isinstance(value, float) and not value.is_integer():
            raise _Unfit
        value = int(value)
    if not all(holds(value, schema[keyword]) for keyword, (_, holds) in BOUNDS.items() if keyword in schema):
        raise _Unfit
    return value


def _array(schema: Mapping[str, Any], value: list[Any], open_file: OpenFile | None) -> Any:
    if "prefixItems" in schema:
        if len(value) != len(schema["prefixItems"]):
            raise _Unfit
        return tuple(_parse(item, one, open_file) for item, one in zip(schema["prefixItems"], value, strict=True))
    return [_parse(schema.get("items", {}), one, open_file) for one in value]


def _object(schema: Mapping[str, Any], value: dict[str, Any], open_file: OpenFile | None) -> Any:
    if "properties" not in schema:
        others = schema.get("additionalProperties", {})
        return {name: _parse(others, one, open_file) for name, one in value.items()}
    for name in value:
        if name not in schema["properties"]:
            raise _Unfit(f"no field {name!r}{did_you_mean(name, schema['properties'])}")
    if missing := [name for name in schema["required"] if name not in value]:
        raise _Unfit(f"without {', '.join(missing)}")
    fields = {name: _parse(schema["properties"][name], one, open_file) for name, one in value.items()}
    return _construct(schema, fields)


def _construct(schema: Mapping[str, Any], value: Any) -> Any:
    """Return `value` as the enum member or dataclass that `schema` names; `value` itself if it names none."""
    if "x-diffsynth-type" not in schema:
        return value
    kind = resolve(schema["x-diffsynth-type"])
    try:
        return kind(value) if issubclass(kind, enum.Enum) else kind(**value)
    except ValueError as error:
        raise _Unfit(str(error)) from None


def _is_image(schema: Mapping[str, Any]) -> bool:
    return schema.get("x-diffsynth-type") == "image"


def _opened(path: str, open_file: OpenFile, *, several: bool) -> Any:
    """Return what is in a file: an image, or a sequence of images if `several` are wanted."""
    found = open_file(path)
    is_sequence = isinstance(found, Sequence)
    if is_sequence and not several:
        raise _Unfit("it has several images")
    return [found] if several and not is_sequence else found


def _image(text: str) -> Image.Image:
    try:
        return decode_image(base64.b64decode(text, validate=True), "image", None, formats=["PNG"])
    except (binascii.Error, CorruptFile, ValueError) as error:
        raise _Unfit(f"{error!s:.160}") from None


def _expected(schema: Mapping[str, Any], image: str) -> str:
    """Return what a schema allows, as text; `image` says how an image is given."""
    if "anyOf" in schema:
        return " or ".join(_expected(choice, image) for choice in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if _is_image(schema):
        return image
    kind = schema.get("type", "")
    bounds = bounds_text(schema)
    of = f" of {_expected(schema['items'], image)}" if schema.get("items") else ""
    return f"{_WORDS.get(kind, kind or 'anything')}{of}" + (f", {bounds}" if bounds else "")
