"""What works here, what does not, and what to type next: the content of `diffsynth doctor`.

Nothing is downloaded, no weights are read, and nothing is changed. A check that fails itself is a finding, too, so that
one broken part never hides the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from diffsynth.diagnosis.finding import Finding
from diffsynth.diagnosis.folders import folders, settings
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
"""Title -> the checks under it, in the order they are shown."""


def diagnose() -> dict[str, list[Finding]]:
    """Look at everything; section -> findings."""
    return {title: [finding for check in checks for finding in _run(check)] for title, checks in SECTIONS.items()}


def is_usable(report: dict[str, list[Finding]]) -> bool:
    """Whether nothing is broken."""
    return all(finding.state != "broken" for findings in report.values() for finding in findings)


def _run(check: Check) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:  # whatever is wrong with an installation, the report goes on
        seen = f"cannot be looked at: {type(error).__name__}: {' '.join(str(error).split())}"
        action = "Mend what the other sections call broken, then run it again; --traceback shows where"
        found.append(Finding(check.__name__.replace("_", " "), "broken", seen, action, cause=error))
    return found
