"""`python -m diffsynth.testing`: what plugin authors run by hand."""

from __future__ import annotations

from pathlib import Path

import click

from diffsynth.cli.output import UserError
from diffsynth.errors import DiffsynthError


@click.group()
def program() -> None:
    """Tools for testing plugins."""


@program.command("tiny-hub")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1)
def tiny_hub(folder: Path, models: tuple[str, ...]) -> None:
    """Write MODELS (all, if none is named) in miniature below FOLDER, as a hub has them."""
    from diffsynth.testing import hub

    try:
        written = hub.tiny_hub(folder, models or None)
    except (DiffsynthError, ValueError, FileExistsError) as error:
        raise UserError(f"{type(error).__name__}: {error}") from error
    size = sum(path.stat().st_size for path in written if path.is_file())
    click.echo(f"{len(written)} files and folders, {size / 1e6:.1f} MB. To use them:", err=True)
    click.echo(f"DIFFSYNTH_MODEL_BASE_PATH={folder} DIFFSYNTH_SKIP_DOWNLOAD=true")


if __name__ == "__main__":
    program()
