"""A pipeline's call as JSON Schema (draft 2020-12), and the conversion of JSON back to arguments.

The schema is made without loading anything: names and defaults come from `inspect.signature`, types from annotations,
descriptions and ranges from the "Args:" sections of docstrings; `documentation` lists which docstring documents which
argument.

Five keywords of ours are in it: `x-diffsynth-type` ("image", or the reference of a dataclass that an object becomes),
`x-diffsynth-host-types` (types that this argument takes too, but not from JSON), `x-diffsynth-host-only` (name ->
description of the arguments that JSON cannot hold, such as `on_step`), `x-diffsynth-other-arguments` (argument of other
programs -> what takes its place) and `x-diffsynth-pipeline`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffsynth.runtime.request import HOST_ARGUMENTS
from diffsynth.runtime.schema.annotations import as_json, schema_of, type_of
from diffsynth.runtime.schema.documentation import documented, with_range
from diffsynth.runtime.schema.values import arguments_from_json
from diffsynth.runtime.unit import Program

__all__ = ["HOST_ONLY", "SchemaMethod", "arguments_from_json", "describe", "model_schema"]

HOST_ONLY = "x-diffsynth-host-only"
"""The keyword under which a schema lists arguments that only a program in the same process can pass."""


class SchemaMethod:
    """The method `schema()` of a pipeline class, with the class's defaults, and of an instance, with its model's."""

    def __get__(self, instance: Any, owner: type) -> Callable[[], dict[str, Any]]:
        return functools.partial(describe, owner if instance is None else instance)


def model_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a model's call as a dict, without reading a file of the model.

    Args:
        name: a model's name or hub id, any case; `plugin:name` where two plugins declare one name.

    Raises:
        UnknownModel: no installed plugin declares the name; the message has the nearest spelling.
        ImportError: the code of its pipeline cannot be imported.
    """
    from diffsynth import registry
    from diffsynth.spec import resolve

    record = registry.get(name)
    return describe(resolve(record.pipeline), title=record.name, defaults=record.defaults)


def describe(subject: Any, *, title: str | None = None, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON Schema of the arguments of a pipeline's call, as a dict.

    Args:
        subject: a subclass of `Pipeline`, or an instance, which has its model's name and defaults.
        title: of the schema; None is the model's name, else the class's.
        defaults: argument -> default, in place of those of a class.

    Raises:
        InvalidPipeline: units of the class do not fit together.
    """
    if isinstance(subject, type):
        cls: Any = subject
        program, signature = cls.build_program(), cls.call_signature(defaults)
    else:
        cls, program, signature = type(subject), subject.program, inspect.signature(subject)
        title = title or subject.model_name
    texts = documented(cls, program)
    properties: dict[str, Any] = {}
    host_only: dict[str, str] = {}
    for name, parameter in signature.parameters.items():
        found = _property(parameter, program, texts.get(name, ""))
        if found is None:
            host_only[name] = texts.get(name, "")
        else:
            properties[name] = found
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title or cls.__name__,
        "description": (inspect.getdoc(cls) or "").partition("\n\n")[0],
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if signature.parameters[name].default is inspect.Parameter.empty],
        "additionalProperties": False,
        HOST_ONLY: host_only,
        "x-diffsynth-other-arguments": dict(cls.other_arguments),
        "x-diffsynth-pipeline": f"{cls.__module__}:{cls.__qualname__}",
    }


def _property(parameter: inspect.Parameter, program: Program, text: str) -> dict[str, Any] | None:
    """Return the JSON Schema of an argument as a dict, or None for an argument that JSON cannot hold."""
    found = None if parameter.name in HOST_ARGUMENTS else schema_of(type_of(parameter, program))
    if found is None:
        return None
    found = with_range(found, text)
    if text:
        found = {"description": text, **found}
    default = as_json(parameter.default)
    return found if default is NotImplemented else {**found, "default": default}
