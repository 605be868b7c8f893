"""The JSON Schema of a type's values."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

from PIL import Image

from diffsynth.runtime.request import LOOP_NAMES, LoopArguments
from diffsynth.runtime.unit import Program

Schema = dict[str, Any]

_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}
_IMAGE = {
    "type": "string",
    "contentEncoding": "base64",
    "contentMediaType": "image/png",
    "x-diffsynth-type": "image",
}


def type_of(parameter: inspect.Parameter, program: Program) -> Any:
    """Return the type that an argument is annotated with, or the annotation's text if it cannot be evaluated.

    Args:
        parameter: of a pipeline's signature; its annotation may be a text.
        program: the pipeline's units; a text is evaluated in the module of the unit that reads the argument.
    """
    if parameter.name in LOOP_NAMES:
        return typing.get_type_hints(LoopArguments)[parameter.name]
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    function = inspect.unwrap(program.owners(parameter.name)[0].function)
    try:
        return eval(parameter.annotation, function.__globals__)
    except (NameError, AttributeError):
        return parameter.annotation


def schema_of(kind: Any) -> Schema | None:
    """Return the JSON Schema of a type's values as a dict, or None if JSON can hold none of them.

    `x-diffsynth-host-types` lists the members of a union that JSON cannot hold.
    """
    if kind is Any or kind is inspect.Parameter.empty:
        return {}
    if isinstance(kind, type) and kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if kind is None:
        return {"type": "null"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is typing.Annotated:
        return schema_of(arguments[0])
    if isinstance(origin, type):
        return _container(origin, arguments)
    return _class(kind) if isinstance(kind, type) else None


def as_json(value: Any) -> Any:
    """Return `value` as plain JSON values (a tuple becomes a list), or NotImplemented if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return NotImplemented


def _union(members: Iterable[Any]) -> Schema | None:
    schemas = {member: schema_of(member) for member in members}
    held = [found for found in schemas.values() if found is not None]
    others = [_name(member) for member, found in schemas.items() if found is None]
    if all(found == {"type": "null"} for found in held):
        return None  # null alone is no useful argument
    united: Schema = held[0] if len(held) == 1 else {"anyOf": held}
    return {**united, "x-diffsynth-host-types": others} if others else united


def _container(origin: type, arguments: tuple[Any, ...]) -> Schema | None:
    if issubclass(origin, Mapping):
        values = schema_of(arguments[1])
        return None if values is None else {"type": "object", "additionalProperties": values}
    if issubclass(origin, tuple) and arguments[-1:] != (...,):
        items = [schema_of(argument) for argument in arguments]
        if None in items:
            return None
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if issubclass(origin, Iterable):
        item = schema_of(arguments[0])
        return None if item is None else {"type": "array", "items": item}
    return None  # a callable


def _class(kind: type) -> Schema | None:
    if issubclass(kind, Image.Image):
        return dict(_IMAGE)
    if issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind], "x-diffsynth-type": _reference(kind)}
    if inspect.isabstract(kind):
        return None  # its subclasses are not known here
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    if issubclass(kind, list | tuple):
        return {"type": "array"}
    return {"type": "object"} if issubclass(kind, dict) else None


def _dataclass(kind: type) -> Schema:
    """Return the JSON Schema, a dict, of a dataclass; fields that JSON cannot hold are left out."""
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    properties: dict[str, Schema] = {}
    for field in fields:
        found = schema_of(hints[field.name])
        if found is not None:
            default = as_json(field.default)
            properties[field.name] = found if default is NotImplemented else {**found, "default": default}
    missing = dataclasses.MISSING
    return {
        "type": "object",
        "properties": properties,
        "required": [each.name for each in fields if each.default is missing and each.default_factory is missing],
        "additionalProperties": False,
        "x-diffsynth-type": _reference(kind),
    }


def _reference(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
