"""`diffsynth recognize`: identify checkpoint files by their headers. Imports no torch for safetensors files."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import click

from diffsynth import _discovery
from diffsynth.cli.output import echo, json_option, show_json, show_table, traceback_option
from diffsynth.errors import CheckpointError, shortened


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option
@traceback_option
@click.pass_context
def recognize(ctx: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Identify checkpoint files by their headers; exit 3 if any of them matches no installed architecture.

    FILE may also be a shard index, a folder that holds one checkpoint, or a shard, which means its whole set. Exit 2 if
    a file cannot be read; the results of the others are printed nevertheless.
    """
    show_trace = bool(ctx.find_root().meta.get("diffsynth.traceback"))
    answers: list[dict[str, Any]] = []
    for file in files:
        answer = _answer(file, show_trace=show_trace)
        if answer not in answers:  # several shards of one set are reported once
            answers.append(answer)
    if as_json:
        show_json(answers)
    rows = [
        (answer["files"][0], found["architecture"], found["checkpoint"] or "-", found["tier"])
        for answer in answers
        for found in answer["components"]
    ]
    if rows and not as_json:
        show_table(("FILE", "ARCHITECTURE", "CHECKPOINT", "BY"), rows)
    lines = [line for answer in answers for line in (answer["error"], *_not_runnable(answer), _extra(answer))]
    for line in filter(None, lines):
        echo(line, err=True)
    kinds = {answer["kind"] for answer in answers} - {None}
    ctx.exit(0 if not kinds else 3 if kinds == {"Unrecognized"} else 2)


def _answer(file: str, *, show_trace: bool) -> dict[str, Any]:
    from diffsynth.core.loader import recognize as recognition
    from diffsynth.core.loader.checkpoint import read_files
    from diffsynth.core.loader.files import checkpoint_at

    answer: dict[str, Any] = {"files": [file], "components": [], "error": None, "kind": None}
    try:
        found = checkpoint_at(Path(file))
        answer["files"] = [str(path) for path in found]
        components = recognition.recognize(read_files(found), *_discovery.catalog().layouts())
    except CheckpointError as error:
        if show_trace:
            echo(traceback.format_exc(), err=True, nl=False)
        return answer | {"error": str(error), "kind": type(error).__name__}
    return answer | {"components": [_component(one) for one in components]}


def _component(found: Any) -> dict[str, Any]:
    return {
        "architecture": found.architecture.name,
        "checkpoint": found.checkpoint.name if found.checkpoint else None,
        "tier": found.tier,
        "prefix": found.prefix,
        "config": {} if found.config is None else dataclasses.asdict(found.config),
        "extra": list(found.extra),
        "not_runnable": found.architecture.not_runnable,
    }


def _not_runnable(answer: dict[str, Any]) -> list[str]:
    """Return a list with a line "FILE: recognised, not yet runnable: ..." for each component that is only named."""
    reasons = [component["not_runnable"] for component in answer["components"]]
    return [f"{answer['files'][0]}: recognised, not yet runnable: {reason}" for reason in reasons if reason]


def _extra(answer: dict[str, Any]) -> str:
    """Return a line such as "FILE: 3 keys that nothing uses: a, b, c" for a recognised file; "" if it has none."""
    extra = [key for component in answer["components"] for key in component["extra"]]
    if not extra:
        return ""
    keys = "key that nothing" if len(extra) == 1 else "keys that nothing"
    return f"{answer['files'][0]}: {len(extra)} {keys} uses: {shortened(extra)}"
