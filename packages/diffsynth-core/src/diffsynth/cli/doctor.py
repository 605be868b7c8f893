"""`diffsynth doctor`: diagnose the installation and print what to do about each fault."""

from __future__ import annotations

import traceback

import click

from diffsynth.cli.output import echo, json_option, show_json, traceback_option
from diffsynth.diagnosis.finding import Finding


@click.command()
@json_option
@traceback_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check what works on this machine and print what to do about the rest; exit 1 if something is broken.

    Nothing is downloaded or changed.
    """
    from diffsynth.diagnosis import diagnose, is_usable

    report = diagnose()
    usable = is_usable(report)
    if as_json:
        sections = {title: [finding.to_dict() for finding in findings] for title, findings in report.items()}
        show_json({"usable": usable, "sections": sections})
    else:
        for title, findings in report.items():
            _show(title, findings)
        echo(_verdict(report))
    if ctx.find_root().meta.get("diffsynth.traceback"):
        for cause in [finding.cause for findings in report.values() for finding in findings if finding.cause]:
            echo("".join(traceback.format_exception(cause)), err=True, nl=False)
    ctx.exit(0 if usable else 1)


def _show(title: str, findings: list[Finding]) -> None:
    echo(title)
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        echo(f"  {finding.state:6}  {finding.name:{width}}  {finding.seen}")
        if finding.next_action:
            echo(f"  {'':6}  {'':{width}}  -> {finding.next_action}")
    echo()


def _verdict(report: dict[str, list[Finding]]) -> str:
    broken = [f"{title}: {one.name}" for title, findings in report.items() for one in findings if one.state == "broken"]
    return f"Broken: {'; '.join(broken)}." if broken else "Nothing is broken."
