"""The `diffsynth` program. A command's module is imported when the command runs; plugins add commands by a hook."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `diffsynth` program, then raise SystemExit with its exit code.

    All output has control characters as escapes: that of commands, logs, warnings, tracebacks, and other libraries.
    Output to a closed stream or pipe is dropped, and changes no exit code.

    Args:
        arguments: command-line arguments; None for those of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    import sys
    import traceback

    from diffsynth.cli.group import program
    from diffsynth.terminal import OutputFailed, escaping_output, open_closed_descriptors

    open_closed_descriptors()
    with escaping_output():
        try:
            try:
                program(args=None if arguments is None else list(arguments), prog_name="diffsynth")
            finally:
                sys.stdout.flush()
        except OutputFailed as error:
            sys.stderr.write(f"Error: {error}\n")
            raise SystemExit(1) from error
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # also one that a plugin's command defines
            traceback.print_exc()  # here, and not by the interpreter, whose output is not escaped
            raise SystemExit(1) from error
