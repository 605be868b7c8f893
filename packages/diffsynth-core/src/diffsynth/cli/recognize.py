"""`diffsynth recognize`: what checkpoint files hold, told by their headers. No torch for safetensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from diffsynth import _discovery
from diffsynth.cli.output import json_option, show_json, show_table, traceback_option
from diffsynth.errors import Unrecognized


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option
@traceback_option
@click.pass_context
def recognize(ctx: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Tell what checkpoint files hold, by their headers; exit 3 if one matches nothing that is installed.

    Each FILE is a checkpoint of its own; shards of one are given by their folder's index or joined with commas.
    """
    answers = [_answer(file) for file in files]
    if as_json:
        show_json(answers)
    else:
        rows = [
            (answer["file"], found["architecture"], found["checkpoint"] or "-", found["tier"])
            for answer in answers
            for found in answer["components"]
        ]
        if rows:
            show_table(("FILE", "ARCHITECTURE", "CHECKPOINT", "BY"), rows)
    unknown = [answer for answer in answers if answer["error"]]
    for answer in unknown:
        click.echo(answer["error"], err=True)
    ctx.exit(3 if unknown else 0)


def _answer(file: str) -> dict[str, Any]:
    from diffsynth.core.loader import header
    from diffsynth.core.loader import recognize as recognition

    catalog = _discovery.catalog()
    architectures = {declared.spec.name: declared.spec for declared in catalog.architectures}
    checkpoints = [declared.spec for declared in catalog.checkpoints]
    tensors = header.read(file)
    try:
        found = recognition.recognize(tensors, architectures, checkpoints)
    except Unrecognized as error:
        return {"file": file, "components": [], "error": str(error)}
    return {"file": file, "components": [_component(one) for one in found], "error": None}


def _component(found: Any) -> dict[str, Any]:
    config = found.config
    return {
        "architecture": found.architecture.name,
        "checkpoint": found.checkpoint.name if found.checkpoint else None,
        "tier": found.tier,
        "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config,
    }
