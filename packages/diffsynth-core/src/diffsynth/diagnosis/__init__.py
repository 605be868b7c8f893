"""Diagnosis of the installation and the machine: the content of `diffsynth doctor`.

Nothing is downloaded, no weights are read, and nothing is changed. A check that raises becomes a finding, so that one
broken check does not hide the results of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from diffsynth.diagnosis.environment import folders, settings
from diffsynth.diagnosis.finding import Finding
from diffsynth.diagnosis.installed import distributions, models, plugins, requirements
from diffsynth.diagnosis.machine import attention, devices, python, quantization
from diffsynth.diagnosis.questions import QUESTIONS

__all__ = ["Finding", "diagnose", "is_usable"]

Check = Callable[[], Iterable[Finding]]

SECTIONS: dict[str, tuple[Check, ...]] = {
    "environment": (python, distributions, requirements),
    "devices": (devices,),
    "attention": (attention,),
    "quantization": (quantization,),
    "plugins": (plugins,),
    "settings": (settings,),
    "folders": (folders,),
    "models": (models,),
    "questions": QUESTIONS,
}
"""Section title -> its checks, in the order they are shown."""


def diagnose() -> dict[str, list[Finding]]:
    """Run all checks and return a dict section title -> list of `Finding`s; a check that raises gives a broken one."""
    return {title: [finding for check in checks for finding in _run(check)] for title, checks in SECTIONS.items()}


def is_usable(report: dict[str, list[Finding]]) -> bool:
    """Whether no `Finding` of `report` (section title -> findings) has the state "broken"."""
    return all(finding.state != "broken" for findings in report.values() for finding in findings)


def _run(check: Check) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:  # a fault of the installation must not end the report
        seen = f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"
        action = "Repair what the other sections report as broken, then run it again; --traceback shows where it failed"
        found.append(Finding(check.__name__.replace("_", " "), "broken", seen, action, cause=error))
    return found
