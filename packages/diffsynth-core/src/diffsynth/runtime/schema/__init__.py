"""A pipeline's call as JSON Schema (draft 2020-12), and the conversion of JSON back to arguments.

The schema is made without loading anything: names and defaults come from `inspect.signature`, types from annotations,
descriptions and ranges from the "Args:" sections of docstrings; `documentation` lists which docstring documents which
argument.

These keywords of ours are in it: `x-diffsynth-type` ("image", or the reference of a dataclass that an object becomes),
`x-diffsynth-host-types` (types that this argument takes too, but not from JSON), `x-diffsynth-host-only` (name ->
description of the arguments that JSON cannot hold, such as `on_step`), `x-diffsynth-other-arguments` (argument of other
programs -> what takes its place), `x-diffsynth-pipeline`, and on request the largest sizes that fit:
`x-diffsynth-max-pixels`, `x-diffsynth-max-frames` and `x-diffsynth-size-limits`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from diffsynth.runtime.request import HOST_ARGUMENTS
from diffsynth.runtime.schema.annotations import as_json, schema_of, type_of
from diffsynth.runtime.schema.documentation import documented, with_range
from diffsynth.runtime.schema.values import SIZE_LIMITS, arguments_from_json
from diffsynth.runtime.unit import Program

__all__ = [
    "HOST_ONLY",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "SIZE_LIMITS",
    "SchemaMethod",
    "arguments_from_json",
    "describe",
    "model_schema",
]

if TYPE_CHECKING:
    from diffsynth.runtime.size_limits import SizeLimits

MAX_PIXELS, MAX_FRAMES = "x-diffsynth-max-pixels", "x-diffsynth-max-frames"
"""The keywords of the largest `height * width` with the default number of frames, and of the largest `num_frames` with
the default height and width."""

HOST_ONLY = "x-diffsynth-host-only"
"""The keyword under which a schema lists arguments that only a program in the same process can pass."""


class SchemaMethod:
    """The method `schema()` of a pipeline class, with the class's defaults, and of an instance, with its model's.

    That of an instance takes `fits`: True or the arguments of a call measures the largest sizes that its device, or its
    `vram_limit`, holds, by plans that take some seconds once; `check()` and calls refuse larger ones from then on.
    """

    def __get__(self, instance: Any, owner: type) -> Callable[..., dict[str, Any]]:
        return functools.partial(describe, owner) if instance is None else functools.partial(_of_instance, instance)


def model_schema(name: str, *, fits: bool | Mapping[str, Any] = False) -> dict[str, Any]:
    """Return the JSON Schema of a model's call as a dict, without reading a weight of the model.

    Args:
        name: a model's name or hub id, any case; `plugin:name` where two plugins declare one name.
        fits: whether the schema has the largest sizes that the default device of this machine holds in bfloat16
            without a policy, by plans that take some seconds; a dict has arguments that the model needs.

    Raises:
        UnknownModel: no installed plugin declares the name; the message has the nearest spelling.
        ImportError: the code of its pipeline cannot be imported.
        Unplannable: `fits` of a model whose files are neither here nor declared.
    """
    from diffsynth import registry
    from diffsynth.spec import resolve

    record = registry.get(name)
    found = describe(resolve(record.pipeline), title=record.name, defaults=record.defaults)
    if fits is False:
        return found
    from diffsynth.core.device import default_device
    from diffsynth.runtime.planning import unloaded
    from diffsynth.runtime.size_limits import measure_limits

    return _with_limits(found, measure_limits(unloaded(record), default_device(), {} if fits is True else fits))


def _of_instance(pipe: Any, *, fits: bool | Mapping[str, Any] = False) -> dict[str, Any]:
    """Return the JSON Schema of an instance; see `SchemaMethod`."""
    from diffsynth.runtime.size_limits import measure_limits

    if fits is not False and pipe.size_limits is None:
        pipe.size_limits = measure_limits(pipe, pipe.device, {} if fits is True else fits)
    return _with_limits(describe(pipe), pipe.size_limits)


def _with_limits(schema: dict[str, Any], limits: SizeLimits | None) -> dict[str, Any]:
    """Return `schema` with the keywords of the largest sizes; `schema` itself if they are not known."""
    if limits is None:
        return schema
    found = schema | {MAX_PIXELS: limits.most_pixels(), SIZE_LIMITS: limits.to_json()}
    return found | ({MAX_FRAMES: limits.most_frames()} if "num_frames" in limits.defaults else {})


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
