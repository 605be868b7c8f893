"""The `diffsynth` program. Each command's module is imported when the command runs; plugins add commands by hook."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, or those of the process; ends by `SystemExit`."""
    from diffsynth.cli.group import program

    program(args=None if arguments is None else list(arguments), prog_name="diffsynth")
