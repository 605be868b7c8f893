"""`diffsynth recognize`: what checkpoint files hold, told by their headers. No torch for safetensors."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import click

from diffsynth import _discovery
from diffsynth.cli.output import json_option, show_json, show_table, traceback_option
from diffsynth.errors import NoFiles, Unrecognized

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5}\.\w+)")


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option
@traceback_option
@click.pass_context
def recognize(ctx: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Tell what checkpoint files hold, by their headers; exit 3 if one matches nothing that is installed.

    FILE may also be an index of shards, or a folder that holds one checkpoint; a shard stands for its whole set.
    """
    answers = [_answer(list(checkpoint)) for checkpoint in dict.fromkeys(_checkpoint(Path(file)) for file in files)]
    if as_json:
        show_json(answers)
    rows = [
        (answer["files"][0], found["architecture"], found["checkpoint"] or "-", found["tier"])
        for answer in answers
        for found in answer["components"]
    ]
    if rows and not as_json:
        show_table(("FILE", "ARCHITECTURE", "CHECKPOINT", "BY"), rows)
    unknown = [answer["error"] for answer in answers if answer["error"]]
    for error in unknown:
        click.echo(error, err=True)
    ctx.exit(3 if unknown else 0)


def _checkpoint(path: Path) -> tuple[Path, ...]:
    from diffsynth.core.loader import files
    from diffsynth.core.loader.config import ModelConfig

    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise NoFiles(f"folder {path} holds no *.safetensors; name the files of one checkpoint")
    elif match := _SHARD.fullmatch(path.name):
        found = sorted(path.parent.glob(f"{match[1]}-*-of-{match[2]}")) or [path]
    else:
        found = [path]
    return tuple(files.find(ModelConfig(path=found)))


def _answer(files: list[Path]) -> dict[str, Any]:
    from diffsynth.core.loader import header
    from diffsynth.core.loader import recognize as recognition

    answer: dict[str, Any] = {"files": [str(file) for file in files], "components": [], "error": None}
    try:
        found = recognition.recognize(header.read(files), *_discovery.catalog().layouts())
    except Unrecognized as error:
        return answer | {"error": str(error)}
    return answer | {"components": [_component(one) for one in found]}


def _component(found: Any) -> dict[str, Any]:
    return {
        "architecture": found.architecture.name,
        "checkpoint": found.checkpoint.name if found.checkpoint else None,
        "tier": found.tier,
        "config": dataclasses.asdict(found.config),
    }
