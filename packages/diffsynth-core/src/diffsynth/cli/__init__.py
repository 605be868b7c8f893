"""The `diffsynth` program. A command's module is imported when the command runs; plugins add commands by a hook."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `diffsynth` program, then raise SystemExit with its exit code.

    Args:
        arguments: command-line arguments; None for those of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    from diffsynth.cli.group import program

    program(args=None if arguments is None else list(arguments), prog_name="diffsynth")
