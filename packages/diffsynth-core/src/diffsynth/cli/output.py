"""Helpers of all commands: tables and JSON on stdout, errors in one line, options `--json` and `--traceback`."""

from __future__ import annotations

import functools
import json
import os
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import click

from diffsynth.errors import Diverged, NotFinite, printable
from diffsynth.terminal import results_on_stdout

POLICIES = ("none", "cpu-offload", "fp8", "dynamic", "disk", "auto")
"""Names of the policies of `diffsynth.core.vram`, copied because that module imports torch; a test compares them."""

_TEXTS = "diffsynth.texts"
"""Key in the context's `meta` of the texts to print when a command with `--json` ends."""

Function = TypeVar("Function", bound=Callable[..., Any])


class UserError(click.ClickException):
    """An error that the user can correct: one line on stderr, exit code 2."""

    exit_code = 2

    def format_message(self) -> str:
        """Return the message, control characters as escapes."""
        return printable(super().format_message())


class RunFailed(UserError):
    """An error in a run that was started correctly, such as a diverged training: one line on stderr, exit code 1."""

    exit_code = 1


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text on stdout, or with `err` on stderr; control characters in it, which may come from a file, are shown
    as escapes.

    Args:
        text: shown by `str`.
        err: print on stderr.
        nl: print a line end after it.
    """
    click.echo(printable(str(text)), err=err, nl=nl)


def fail(ctx: click.Context, error: Exception) -> NoReturn:
    """Raise UserError with one line about an error; with `--traceback`, print the error's traceback before.

    Raises:
        RunFailed: the error is `Diverged`, `NotFinite` or an OSError, such as of a full disk.
        UserError: any other error.
    """
    if ctx.find_root().meta.get("diffsynth.traceback"):
        echo(traceback.format_exc(), err=True, nl=False)
    text = str(error)
    kind = RunFailed if isinstance(error, Diverged | NotFinite | OSError) else UserError
    raise kind(text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}") from error


def json_option(function: Function) -> Function:
    """Return `function`, a command, with the option `--json` added, which is passed as `as_json`.

    With the option, standard output has what `show_json` prints, and nothing else: what plugins and libraries print
    goes to standard error.
    """

    @functools.wraps(function)
    def run(*arguments: Any, as_json: bool, **options: Any) -> Any:
        if not as_json:
            return function(*arguments, as_json=as_json, **options)
        with results_on_stdout() as texts:
            click.get_current_context().meta[_TEXTS] = texts
            return function(*arguments, as_json=as_json, **options)

    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(run)  # type: ignore[return-value]


def traceback_option(function: Function) -> Function:
    """Return `function`, a command, with the option `--traceback` added, which sets that of the whole program."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().meta["diffsynth.traceback"] = True

    option = click.option(
        "--traceback",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Print the traceback of an error.",
    )
    return option(function)


def show_json(value: Any) -> None:
    """Print a value as JSON on stdout, control characters as escapes of JSON; in a command with `json_option`."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    text = printable(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))
    click.get_current_context().meta[_TEXTS].append(f"{text}\n")


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; cells are never cut, so that the output can be searched and piped."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    for row in (headers, *rows):
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_record(values: dict[str, Any], *, indent: int = 0) -> None:
    """Print names and values line by line on stdout, nested mappings indented; empty values are omitted."""
    shown = {name: value for name, value in values.items() if value not in (None, "", {}, [])}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        if isinstance(value, dict):
            echo(f"{'':{indent}}{name}")
            show_record(value, indent=indent + 2)
        else:
            echo(f"{'':{indent}}{name:{width}}  {value}")


def what_to_install() -> str:
    """Return a text for an installation without models: `pip install` lines, or that DIFFSYNTH_PLUGINS allows none."""
    if "DIFFSYNTH_PLUGINS" in os.environ:
        return f"No models: DIFFSYNTH_PLUGINS={os.environ['DIFFSYNTH_PLUGINS']!r} allows no plugin that has any."
    from diffsynth.core.loader import first_party

    packages = first_party.models_by_package()
    width = max(map(len, packages), default=0)
    lines = [f"  pip install {name:{width}}  # {', '.join(models)}" for name, models in packages.items()]
    return "\n".join(["No models are installed. Each model family is a package:", *lines])
