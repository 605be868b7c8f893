"""`diffsynth list`, `diffsynth plugins` and `diffsynth info`: show what is installed. Imports no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsynth import _discovery, registry
from diffsynth._plugin_loading import KINDS, Plugin
from diffsynth.cli.completion import ModelName
from diffsynth.cli.output import UserError, echo, json_option, show_json, show_record, show_table, what_to_install
from diffsynth.cli.output import traceback_option as with_traceback

if TYPE_CHECKING:
    from diffsynth.testing.plugin_faults import PluginReport
from diffsynth.runtime.writers import FOLDER, declared_writers


@click.command("list")
@click.argument("pattern", required=False)
@json_option
@with_traceback
def list_models(pattern: str | None, as_json: bool) -> None:
    """Show the installed models.

    PATTERN is part of a name or hub id, or a glob: `diffsynth list 'wan*i2v*'`.
    """
    if pattern is not None and not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    records = registry.list(pattern)
    if as_json:
        show_json([record.to_dict() for record in records])
    elif records:
        rows = [(r.name, r.task, r.weights, r.plugin, r.description) for r in records]
        show_table(("NAME", "TASK", "WEIGHTS", "PLUGIN", "DESCRIPTION"), rows)
    elif registry.list():
        echo(f"No installed model matches {pattern!r}. Run: diffsynth list", err=True)
    else:
        echo(what_to_install())


@click.command()
@click.argument("name", metavar="[PLUGIN]", required=False)
@click.option("--check", is_flag=True, help="Build what plugins add, all or PLUGIN, and show what is wrong with it.")
@json_option
@with_traceback
@click.pass_context
def plugins(ctx: click.Context, name: str | None, check: bool, as_json: bool) -> None:
    """Show the installed plugins; exit 1 if one is broken. --traceback prints where it failed.

    With --check, what plugins add is imported and built: pipelines, networks on the meta device, solvers on small
    tensors. Nothing is downloaded and no network is run.
    """
    if check:
        ctx.exit(_check(ctx, name, as_json))
    if name is not None:
        raise UserError(f"{name!r}: a plugin is named together with --check. Run: diffsynth plugins --check {name}")
    catalog, problems = _discovery.catalog(), registry.problems()
    if as_json:
        show_json(
            {
                "plugins": [dataclasses.asdict(plugin) for plugin in catalog.plugins],
                "problems": [dataclasses.asdict(problem) for problem in problems],
            }
        )
    else:
        # A plugin with a warning and a broken part is broken.
        states = {(p.plugin, p.distribution): p.state for p in sorted(problems, key=lambda p: p.state != "warning")}
        rows = [
            (p.name, p.distribution, p.version, states.get((p.name, p.distribution), "ok"), _declares(p))
            for p in catalog.plugins
        ]
        loaded = {(p.name, p.distribution) for p in catalog.plugins}
        rows += [
            (p.plugin, p.distribution, p.version, p.state, "")
            for p in problems
            if (p.plugin, p.distribution) not in loaded
        ]
        show_table(("PLUGIN", "DISTRIBUTION", "VERSION", "STATE", "DECLARES"), rows)
        for problem in problems:
            echo(f"\n{problem}", err=True)
            if problem.traceback and ctx.find_root().meta.get("diffsynth.traceback"):
                echo(problem.traceback, err=True, nl=False)
    ctx.exit(1 if any(problem.state == "broken" for problem in problems) else 0)


@click.command()
@click.argument("subject", metavar="MODEL|FILE", type=ModelName(files=True))
@json_option
@with_traceback
def info(subject: str, as_json: bool) -> None:
    """Show the record of a model, or the record of the call in a file that `generate` wrote, or in FOLDER/ of frames.

    With --json, a model's record includes the JSON schema of its call.
    """
    if subject.lower().endswith(tuple(declared_writers())):
        from diffsynth import provenance

        if not Path(subject).exists():
            raise UserError(f"{subject}: no such {'folder' if subject.endswith(FOLDER) else 'file'}")
        values = provenance.read(subject)
    else:
        values = registry.get(subject).to_dict()
        if as_json:
            values["schema"] = _schema(subject)
    if as_json:
        show_json(values)
    else:
        show_record(values)


def _check(ctx: click.Context, name: str | None, as_json: bool) -> int:
    """Check the plugin called `name`, or all for None, print the reports, and return the exit code: 1 for a fault."""
    from diffsynth.testing.plugin_faults import check_plugin, plugin_names

    reports = []
    for each in plugin_names() if name is None else [name]:
        echo(f"checking {each} ...", err=True)  # names the plugin if one ends the process
        reports += check_plugin(each)
    faults = [fault for report in reports for fault in report.faults]
    if as_json:
        show_json({"plugins": [dataclasses.asdict(report) for report in reports]})
        return 1 if faults else 0
    rows = [
        (r.plugin, r.distribution, r.version, "broken" if r.faults else "ok", _counts(r), f"{r.seconds:.1f}")
        for r in reports
    ]
    show_table(("PLUGIN", "DISTRIBUTION", "VERSION", "STATE", "CHECKS", "SECONDS"), rows)
    for fault in faults:
        echo(f"\n{fault}", err=True)
        if fault.traceback and ctx.find_root().meta.get("diffsynth.traceback"):
            echo(fault.traceback, err=True, nl=False)
    return 1 if faults else 0


def _counts(report: PluginReport) -> str:
    counts = {"passed": report.passed, "failed": len(report.faults), "skipped": len(report.skipped)}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _schema(model: str) -> dict[str, Any] | None:
    """Return the JSON Schema of a model's call as a dict; if that fails, print the reason and return None."""
    from diffsynth.runtime.schema import model_schema

    try:
        return model_schema(model)
    except Exception as error:  # a plugin's module may raise anything; the rest of the record is shown nevertheless
        echo(f"no schema: {type(error).__name__}: {error}. Run: diffsynth doctor", err=True)
        return None


def _declares(plugin: Plugin) -> str:
    counts = {
        kind: sum(one.plugin == plugin.name and one.distribution == plugin.distribution for one in facts)
        for kind in KINDS
        if (facts := getattr(_discovery.catalog(), kind))
    }
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count) or "nothing yet"
