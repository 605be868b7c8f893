"""One line that tests a plugin: `test_toy = conformance("diffsynth-toy")`. `docs/conformance.md` lists the checks.

What is tested follows from what the plugin declares. The checks themselves stand in `diffsynth.testing.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffsynth.errors import Unavailable
from diffsynth.testing.checks.check import Check, Subject

CONFORMANCE_VERSION = 3
"""Raised whenever a check is added or becomes stricter, so that a plugin can say what it passed."""


def conformance(distribution: str) -> Callable[..., None]:
    """A parametrised pytest function with one case for each check that the plugin's declarations call for.

    A case whose subject a failed case has already found broken is skipped and says so: one cause, one failure. A
    case that this machine cannot run, as a backend without its device, is skipped with the reason.

    Args:
        distribution: the name a plugin is installed by, `"diffsynth-toy"`.

    Raises:
        ValueError: no distribution of that name offers an allowed plugin.
        ImportError: pytest is not installed.
    """
    pytest = _pytest()
    checks = checks_of(distribution)
    runner = CheckRunner(checks)

    @pytest.mark.parametrize("check", [pytest.param(check, id=check.name) for check in checks])
    def conforms(check: Check) -> None:
        __tracebackhide__ = True
        if blocker := runner.failed_dependency(check):
            pytest.skip(f"says nothing while {blocker!r} fails")
        error = runner.error(check)
        if isinstance(error, Unavailable):
            pytest.skip(str(error))
        if error is not None:
            raise error

    return conforms


def checks_of(distribution: str) -> list[Check]:
    """The checks of an installed plugin, in the order in which they build on each other; none has run.

    Raises:
        ValueError: no distribution of that name offers an allowed plugin.
    """
    from diffsynth.testing.checks import architectures, attention, layouts, lora, pipelines, plugin, wrapping

    subject = Subject.find(distribution)
    parts = (plugin, architectures, wrapping, lora, layouts, pipelines, attention)
    return [check for part in parts for check in part.checks(subject)]


class CheckRunner:
    """What each check came to. Each runs once, when it or one that builds on it is asked for."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._by_name = {check.name: check for check in checks}
        assert len(self._by_name) == len(checks), "two checks have one name"
        self._errors: dict[str, Exception | None] = {}

    def failed_dependency(self, check: Check) -> str | None:
        """The name of the failed check that this one builds on, if there is one."""
        for name in check.after:
            earlier = self._by_name[name]
            if found := self.failed_dependency(earlier):
                return found
            if self.error(earlier) is not None:
                return name
        return None

    def error(self, check: Check) -> Exception | None:
        """What the check raised."""
        if check.name not in self._errors:
            try:
                check.run()
            except Exception as error:
                self._errors[check.name] = error
            else:
                self._errors[check.name] = None
        return self._errors[check.name]


def _pytest() -> Any:
    try:
        import pytest
    except ModuleNotFoundError:
        message = "the conformance suite runs under pytest, which is not installed. Run: pip install pytest"
        raise ImportError(message) from None
    return pytest
