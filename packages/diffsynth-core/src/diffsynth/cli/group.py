"""The command group of the `diffsynth` program: finds commands by name, shows help, prints errors in one line."""

from __future__ import annotations

import difflib
from typing import Any

import click
from click.shell_completion import CompletionItem

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.cli.output import UserError, echo, fail, what_to_install
from diffsynth.errors import DiffsynthError, did_you_mean
from diffsynth.runtime.synonyms import SYNONYMS
from diffsynth.spec import CommandSpec, resolve

_OWN = {
    "list": ("diffsynth.cli.models:list_models", "Show the installed models."),
    "plugins": ("diffsynth.cli.models:plugins", "Show or check the installed plugins; exit 1 if one is broken."),
    "info": ("diffsynth.cli.models:info", "Show a model's record, or the record in a file of a result."),
    "recognize": ("diffsynth.cli.recognize:recognize", "Identify checkpoint files by their headers."),
    "convert": ("diffsynth.cli.convert:convert", "Write a checkpoint as one safetensors file."),
    "doctor": ("diffsynth.cli.doctor:doctor", "Check what works on this machine."),
    "generate": ("diffsynth.cli.generate:generate", "Run a model and write its result to a file."),
    "replay": ("diffsynth.cli.replay:replay", "Generate a file again from its record, and compare."),
    "plan": ("diffsynth.cli.plan:plan", "Compute memory and time of a call, without weights."),
    "new-plugin": ("diffsynth.cli.new_plugin:new_plugin", "Write a plugin package to start from."),
}


class Program(click.Group):
    """Commands of core and of plugins; a command is imported when it runs.

    A plugin's command can also be called as `plugin:name`, which is needed if two plugins declare one name.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return a list of the names of all commands: those of core in fixed order, then those of plugins, sorted."""
        return [*_OWN, *sorted({one.spec.name for one in _discovery.catalog().commands} - set(_OWN))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the `click.Command` called `cmd_name`, a name or `"plugin:name"`; None if there is none.
        Raise UserError if several plugins have it, or a plugin's command cannot be imported.
        """
        if cmd_name in _OWN:
            command = resolve(_OWN[cmd_name][0])
            assert isinstance(command, click.Command)
            return command
        found = [
            one for one in _discovery.catalog().commands if cmd_name in (one.spec.name, f"{one.plugin}:{one.spec.name}")
        ]
        if len(found) > 1:
            exact = " or ".join(f"{one.plugin}:{one.spec.name}" for one in found)
            raise UserError(f"{cmd_name!r} is a command of {len(found)} plugins; use {exact}")
        return _plugin_command(found[0]) if found else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return click's (name, command, other arguments); for an unknown name raise UserError with the nearest."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            broken = _discovery.broken_plugins()
            notes = f"  {_discovery.describe(broken)}" if broken else ""
            from diffsynth.core.loader import first_party

            known = self.list_commands(ctx)
            hint = first_party.where_is_command(name) or "Run: diffsynth --help"
            raise UserError(f"there is no command {name!r}{did_you_mean(name, known)}  {hint}{notes}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands into the help text; no command is imported for that."""
        rows = [(name, text) for name, (_, text) in _OWN.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        if declared := sorted(_discovery.catalog().commands, key=lambda one: (one.spec.name, one.plugin)):
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(one.spec.name, one.spec.help or f"from {one.distribution}") for one in declared])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return a list of the completions of a command's name, and of options; no command is imported for that."""
        texts = {name: text for name, (_, text) in _OWN.items()}
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=texts.get(name)) for name in names]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and return its result; a `DiffsynthError`, ValueError or OSError becomes a UserError of one
        line. An unknown option is named with the one that is meant.
        """
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            error.possibilities = _meant(error) or error.possibilities
            raise
        except (DiffsynthError, ValueError, OSError) as error:
            fail(ctx, error)
        except (click.ClickException, click.exceptions.Exit, click.Abort, SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if ctx.invoked_subcommand not in _OWN:
                error.add_note(f"raised by the command {ctx.invoked_subcommand!r} of a plugin. Run: diffsynth plugins")
            raise


def _meant(error: click.NoSuchOption) -> list[str]:
    """Return the option that an unknown one means: that of an argument's name in Python, `--num_inference_steps`, or in
    other programs, `--guidance-scale`, or the nearest spelling; `--set NAME=VALUE` for any other name if the command
    has it.
    """
    name = error.option_name.lstrip("-").replace("-", "_")
    options = [each for each in error.ctx.command.params if isinstance(each, click.Option)] if error.ctx else []
    by_name = {spelled: each for each in options for spelled in (each.name or "", *each.opts)}
    has_set = any("--set" in each.opts for each in options) and name.isidentifier()
    for each in SYNONYMS.get(name, ()):
        if option := next((option for option in options if option.name == each), None):
            return [option.opts[-1]]
        if has_set:
            return [f"--set {each}=VALUE"]
    near = difflib.get_close_matches(name, [key.lstrip("-").replace("-", "_") for key in by_name], n=1, cutoff=0.75)
    for key, option in by_name.items():
        if near and key.lstrip("-").replace("-", "_") == near[0]:
            return [option.opts[-1]]
    return [f"--set {name}=VALUE"] if has_set else []


def _plugin_command(declared: Declared[CommandSpec]) -> click.Command:
    subject = f"command {declared.spec.name!r} of plugin {declared.plugin} ({declared.distribution} {declared.version})"
    try:
        command = resolve(declared.spec.command)
    except Exception as error:
        raise UserError(f"{subject} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(command, click.Command):
        raise UserError(f"{subject}: {declared.spec.command!r} is {type(command).__name__}, expected a click.Command")
    return command


@click.group(cls=Program, invoke_without_command=True)
@click.version_option(package_name="diffsynth-core", prog_name="diffsynth")
@click.option("--traceback", is_flag=True, help="Print the traceback of an error.")
@click.pass_context
def program(ctx: click.Context, traceback: bool) -> None:
    """Generate images and videos with diffusion models."""
    ctx.meta["diffsynth.traceback"] = traceback
    if ctx.invoked_subcommand is None:
        echo(ctx.get_help())
        if not _discovery.catalog().models:
            echo(f"\n{what_to_install()}")
