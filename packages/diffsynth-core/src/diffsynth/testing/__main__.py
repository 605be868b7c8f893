"""`python -m diffsynth.testing`: command-line tools for plugin authors."""

from __future__ import annotations

from pathlib import Path

import click

from diffsynth.cli.output import UserError, echo
from diffsynth.errors import DiffsynthError


@click.group()
def program() -> None:
    """Tools for testing plugins."""


@program.command("tiny-hub")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1)
def tiny_hub(folder: Path, models: tuple[str, ...]) -> None:
    """Write tiny versions of MODELS (default: all) below FOLDER, under the file names of the hub."""
    from diffsynth.testing import hub

    try:
        written = hub.tiny_hub(folder, models or None)
    except (DiffsynthError, ValueError, FileExistsError) as error:
        raise UserError(f"{type(error).__name__}: {error}") from error
    size = sum(path.stat().st_size for path in written if path.is_file())
    echo(f"{len(written)} files and folders, {size / 1e6:.1f} MB. To use them, set:", err=True)
    echo(f"DIFFSYNTH_MODEL_BASE_PATH={folder} DIFFSYNTH_SKIP_DOWNLOAD=true")


if __name__ == "__main__":
    program()
