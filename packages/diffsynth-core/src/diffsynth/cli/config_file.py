"""`--config FILE` of a command: its options and the arguments of the call from a TOML or JSON file. No torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from diffsynth.cli.output import Function, UserError
from diffsynth.runtime.synonyms import which_is_meant

_OTHERS = "diffsynth.config.others"
"""The key of the context under which the arguments of the call in a file are kept."""

_FILE = "diffsynth.config.file"
"""The key of the context under which the path of the file is kept."""

_SETTINGS = "settings"
"""The name of the parameter of `--set`, whose texts a file has as arguments."""


def config_option(function: Function) -> Function:
    """Return `function`, a command, with the option `--config FILE`, whose values are those of options and arguments
    that the command line does not give; those that are no options are given to `config_settings`.
    """
    option = click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_use,
        help="TOML or JSON file with options and arguments of the call; the command line has precedence.",
    )
    return option(function)


def config_settings(ctx: click.Context, settings: Sequence[str]) -> tuple[str, ...]:
    """Return the texts `NAME=VALUE` of `--set`, those of the file of `--config` included; a name that the command line
    sets is not taken from the file.

    Args:
        ctx: of the command.
        settings: the texts of the command line.
    """
    given = {text.partition("=")[0] for text in settings}
    from_file = ctx.meta.get(_OTHERS, {})
    others = [f"{name}={json.dumps(value)}" for name, value in from_file.items() if name not in given]
    return (*others, *settings)


def check_config(ctx: click.Context, arguments: Collection[str], instead: Collection[str]) -> None:
    """Raise UserError for a key of the file of `--config` that is neither an option nor an argument of the call, with
    the nearest of both.

    Args:
        ctx: of the command.
        arguments: names of the arguments of the call.
        instead: names of arguments for which the call itself says what takes their place.

    Raises:
        UserError: an unknown key.
    """
    for name in ctx.meta.get(_OTHERS, {}):
        if name not in arguments and name not in instead:
            near = which_is_meant(name, [*_names(ctx.command), *arguments])
            raise UserError(f"--config {ctx.meta[_FILE]}: unknown key {name!r}{near}")


def without_set(ctx: click.Context, options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return `options` without those of the file of `--config` that `--set` of the command line sets, too.

    Args:
        ctx: of the command.
        options: parameter -> value.
        settings: the texts of the command line.
    """
    given = {text.partition("=")[0] for text in settings}
    from_file = {name for name in options if ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP}
    return {name: value for name, value in options.items() if name not in given & from_file}


def _use(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the values of a file the defaults of the command's options."""
    if path is None:
        return
    names = _names(ctx.command)
    options: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in _read(path).items():
        name = names.get(key.replace("-", "_"))
        if name is None and not key.isidentifier():
            raise UserError(f"--config {path}: unknown key {key!r}{which_is_meant(key, names)}")
        if (name or key) in {**options, **others}:
            raise UserError(f"--config {path}: {name or key} is set twice")
        if name is None:
            others[key] = value
        else:
            options[name] = [value] if isinstance(value, str) and name in _several(ctx.command) else value
        if isinstance(value, Mapping) and name is not None:
            raise UserError(f"--config {path}: {key} is a table; expected a text, a number, true, false or a list")
    ctx.default_map = {**(ctx.default_map or {}), **options}
    ctx.meta[_OTHERS], ctx.meta[_FILE] = others, path


def _names(command: click.Command) -> dict[str, str]:
    """Return a dict key of a file -> parameter of the command: names of options, with underscores, and of arguments."""
    found: dict[str, str] = {}
    for each in command.params:
        if each.name in (None, _SETTINGS) or not each.expose_value:
            continue
        assert each.name is not None
        texts = [text.lstrip("-").replace("-", "_") for text in each.opts if text.startswith("--")]
        found |= dict.fromkeys((each.name, *texts), each.name)
    return found


def _several(command: click.Command) -> set[str | None]:
    """Return a set of the parameters of options that may be repeated."""
    return {each.name for each in command.params if isinstance(each, click.Option) and each.multiple}


def _read(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file, or the object of a JSON file, by the suffix."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"--config {path} is not in UTF-8; save it in UTF-8") from None
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        content = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"--config {path} is not {kind}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected a JSON object of names and values")
    return content
