"""Arguments of a call from the command line: options, and `--set NAME=VALUE` by the JSON Schema of the pipeline."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.output import Function, UserError, fail
from diffsynth.errors import CheckpointError

if TYPE_CHECKING:
    from diffsynth.core.loader.config import ModelConfig
    from diffsynth.registry import ModelRecord


def set_option(function: Function) -> Function:
    """Return `function`, a command, with the option `--set NAME=VALUE` added, whose texts are passed as `settings`."""
    option = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set any other argument of the pipeline; may be repeated.",
    )
    return option(function)


def component_option(function: Function) -> Function:
    """Return `function`, a command, with the option `--component ROLE=FILE`, whose texts are passed as `files`."""
    option = click.option(
        "--component",
        "files",
        multiple=True,
        metavar="ROLE=FILE",
        help="File of a component, such as a ControlNet, or in place of the model's own; may be repeated.",
    )
    return option(function)


def given_components(record: ModelRecord, files: Sequence[str]) -> dict[str, ModelConfig]:
    """Return a dict role -> `ModelConfig` of the texts `ROLE=FILE` of `--component`; a role of many that is given
    several times has them as "controlnet[0]", "controlnet[1]".

    FILE is a path, or a source: `owner/repository:pattern`, or `scheme://location`. Loads no weights.

    Args:
        record: of the model.
        files: the texts.

    Raises:
        UserError: a text without ROLE=, a role that the pipeline does not have (with the nearest spelling), or one that
            is given twice and takes one component.
        CheckpointError: the file does not exist.
    """
    if not files:
        return {}
    from diffsynth.runtime.composition import compose
    from diffsynth.runtime.role import Role, check_component_names
    from diffsynth.spec import resolve

    pipeline = resolve(record.pipeline)
    roles = compose(pipeline).roles
    found: dict[str, ModelConfig] = {}
    for text in files:
        role, equals, file = text.partition("=")
        if not equals or not file:
            raise UserError(f"--component {text!r}: expected ROLE=FILE")
        try:
            check_component_names([role], roles, pipeline_name=pipeline.__name__)
        except TypeError as error:
            raise UserError(f"--component {text}: {error}") from error
        need = roles.get(role)
        if isinstance(need, Role) and need.many:
            role = f"{role}[{sum(name.startswith(f'{role}[') for name in found)}]"
        if role in found:
            raise UserError(f"--component {text}: {role} is given twice")
        found[role] = config_of_file(file)
    return found


def config_of_file(text: str) -> ModelConfig:
    """Return the `ModelConfig` of a path or a source, `owner/repository:pattern` or `scheme://location`; what exists is
    a path.
    """
    from diffsynth.core.loader.config import ModelConfig

    is_source = not Path(text).exists() and ("://" in text or re.fullmatch(r"[\w.-]+/[\w.-]+:[^:]+", text) is not None)
    return ModelConfig.from_source(text) if is_source else ModelConfig(path=text)


@dataclasses.dataclass(frozen=True)
class GivenLoRA:
    """A LoRA of the command line, or of a record.

    Args:
        config: its file.
        scale: its strength.
        role: of the component that it changes; None is each that has one of its layers.
        options: further arguments of `load_lora`.
    """

    config: ModelConfig
    scale: float = 1.0
    role: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load_into(self, pipe: Any) -> None:
        """Load the LoRA into a pipeline; see `load_lora`.

        Args:
            pipe: the pipeline.

        Raises:
            CheckpointError, ValueError: of `load_lora`.
        """
        part = None if self.role is None else pipe.parts.get(self.role)
        pipe.load_lora(part, self.config, alpha=self.scale, **self.options)

    def check(self, pipe: Any) -> None:
        """Raise the error of `load_lora` for layers that do not fit the components of a pipeline without weights.

        Args:
            pipe: the pipeline.

        Raises:
            CheckpointError, ValueError: of `load_lora`.
        """
        pipe.check_lora(self.config, None if self.role is None else pipe.parts.get(self.role))


def given_loras(texts: Sequence[str]) -> tuple[GivenLoRA, ...]:
    """Return a tuple of the LoRAs `FILE` or `FILE:SCALE` of `--lora`, whose files are there: those of a hub are
    downloaded.

    The last colon separates a scale if a number follows it, so that paths of Windows and sources may have colons.

    Args:
        texts: of the option.

    Raises:
        UserError: no FILE, or a scale that is not finite.
        CheckpointError: a file that does not exist, or cannot be downloaded.
    """
    found = []
    for text in texts:
        file, scale = _split_scale(text)
        found.append(GivenLoRA(config_of_file(file), scale))
    if found:
        from diffsynth.runtime.branch_lora import find_lora

        for lora in found:
            find_lora(lora.config)
    return tuple(found)


def _split_scale(text: str) -> tuple[str, float]:
    """Return the file and the scale of a text `FILE` or `FILE:SCALE`."""
    file, colon, end = text.rpartition(":")
    try:
        scale = float(end)
    except ValueError:
        file, colon, scale = text, "", 1.0
    if not colon or Path(text).exists():
        file, scale = text, 1.0
    if not file or not math.isfinite(scale):
        raise UserError(f"--lora {text!r}: expected FILE or FILE:SCALE, with a number such as 0.8")
    return file, scale


def call_arguments(record: ModelRecord, options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return a dict argument -> value: `options`, then `settings`, converted to what the pipeline's schema says, with
    images and videos opened. Loads no weights.

    A text of `settings` is read as JSON or as a Python literal if that fits the schema, else taken as it is.

    Args:
        record: of the model.
        options: argument -> value of the command's own options that are given.
        settings: the texts `NAME=VALUE` of `--set`.

    Raises:
        UserError: a text without NAME=, an argument that is given twice, that the pipeline does not have (with the
            nearest spelling), that no text can hold, or whose value does not fit.
        CheckpointError: a video that does not exist or cannot be read.
    """
    texts = _texts(settings, options)
    from diffsynth.runtime.request import reject_unknown
    from diffsynth.runtime.schema import describe
    from diffsynth.spec import resolve

    pipeline = resolve(record.pipeline)
    signature = pipeline.call_signature(record.defaults)
    schema = describe(pipeline, title=record.name, defaults=record.defaults)
    try:
        reject_unknown([*options, *texts], signature, pipeline.other_arguments)
        values = {name: _value(schema, name, text) for name, text in texts.items()}
    except TypeError as error:  # an argument from the command line is the user's error, not a fault of the program
        fail(click.get_current_context(), error)
    return {**options, **values}


def shown_arguments(arguments: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return `arguments` as JSON values; a value that JSON cannot hold, such as an image, as its text in `settings`."""
    return {**arguments, **input_texts(arguments, settings)}


def input_texts(arguments: Mapping[str, Any], settings: Sequence[str]) -> dict[str, str]:
    """Return a dict argument -> its text in `settings`, of those that JSON cannot hold, such as an image.

    Args:
        arguments: of the call.
        settings: the texts of `--set`.
    """
    from diffsynth.runtime.schema.annotations import as_json

    texts = dict(setting.split("=", 1) for setting in settings)
    return {
        name: texts[name] for name, value in arguments.items() if name in texts and as_json(value) is NotImplemented
    }


def _texts(settings: Sequence[str], options: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict argument -> text of its value."""
    texts: dict[str, str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--set {setting!r}: expected NAME=VALUE")
        if name in texts or name in options:
            raise UserError(f"--set {setting}: {name} is set twice")
        texts[name] = text
    return texts


def _value(schema: Mapping[str, Any], name: str, text: str) -> Any:
    """Return the first reading of `text` that the schema of argument `name` allows; raise TypeError if the argument
    cannot be given as text.
    """
    from diffsynth.runtime.schema import arguments_from_json

    errors = []
    for candidate in (*_literals(text), text):
        try:
            return arguments_from_json(schema, {name: candidate}, open_file=functools.partial(_opened, name))[name]
        except ValueError as error:
            errors.append(error)
    raise UserError(f"--set {errors[0]}")


def _literals(text: str) -> Iterator[Any]:
    """Yield the values that `text` is in JSON and in Python, as JSON values: a tuple is a list."""
    from diffsynth.runtime.schema.annotations import as_json

    for read in (json.loads, ast.literal_eval):
        try:
            value = as_json(read(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if value is not NotImplemented:
            yield value


def _opened(name: str, path: str) -> Any:
    """Return the PIL image of a file, or the `VideoData` of a video, an animated image or a folder of images, for
    argument `name`.
    """
    from diffsynth.core.data.media import VIDEO_SUFFIXES, open_media

    try:
        return open_media(path)
    except (CheckpointError, ValueError) as error:
        if Path(path).suffix.lower() in VIDEO_SUFFIXES:
            raise
        what = "a clip" if Path(path).is_dir() else "an image"
        raise ValueError(f"{name}={path}: cannot be opened as {what}: {error}") from error
