"""`diffsynth train recipe.toml`."""

from __future__ import annotations

from pathlib import Path

import click

from diffsynth.cli.output import echo


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--resume",
    default="",
    help="Folder of a checkpoint to resume from, or 'last' for the newest one in the output folder.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting of the recipe, e.g. loop.steps=10; may be repeated.",
)
def train(recipe: Path, resume: str, changes: tuple[str, ...]) -> None:
    """Train according to RECIPE, a TOML file; print the paths of the final weights."""
    import logging

    from diffsynth.errors import DiffsynthError
    from diffsynth_train.checkpoint import last_checkpoint
    from diffsynth_train.config import read_recipe
    from diffsynth_train.loop import train as run

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("diffsynth_train").setLevel(logging.INFO)
    try:
        settings = read_recipe(recipe, changes=changes)
        folder = last_checkpoint(Path(settings.output.folder)) if resume == "last" else Path(resume)
        paths = run(settings, resume=folder if resume else None)
    except DiffsynthError as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    for path in paths:
        echo(path)
