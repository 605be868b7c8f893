"""Conformance suite of a plugin: `test_toy = conformance("diffsynth-toy")`. `docs/conformance.md` lists the checks.

The checks that run depend on the plugin's declarations. They are implemented in `diffsynth.testing.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffsynth.errors import Unavailable
from diffsynth.testing.checks.check import Check, Subject

CONFORMANCE_VERSION = 6
"""Version of the suite, increased whenever a check is added or becomes stricter."""


def conformance(distribution: str) -> Callable[..., None]:
    """Return a parametrised pytest test function, with one case for each check that applies to the plugin of
    `distribution`.

    A case that depends on a failed case is skipped, so that one cause gives one failure. A case that this machine
    cannot run, such as a backend without its device, is skipped with the reason.

    Args:
        distribution: name of the installed distribution, `"diffsynth-toy"`.

    Raises:
        ValueError: no distribution of that name has an allowed plugin.
        ImportError: pytest is not installed.
    """
    pytest = _pytest()
    checks = checks_of(distribution)
    runner = CheckRunner(checks)

    @pytest.mark.parametrize("check", [pytest.param(check, id=check.name) for check in checks])
    def conforms(check: Check) -> None:
        __tracebackhide__ = True
        if dependency := runner.failed_dependency(check):
            pytest.skip(f"cannot be judged while {dependency!r} fails")
        error = runner.error(check)
        if isinstance(error, Unavailable):
            pytest.skip(str(error))
        if error is not None:
            raise error

    return conforms


def checks_of(distribution: str) -> list[Check]:
    """Return a list of the `Check`s (named tests, not yet run) of an installed distribution, each after those it
    depends on.

    Raises:
        ValueError: no distribution of that name has an allowed plugin.
    """
    return checks_of_subject(Subject.find(distribution))


def checks_of_subject(subject: Subject) -> list[Check]:
    """Return a list of the `Check`s (named tests, not yet run) of a distribution or plugin, each after those it depends
    on.
    """
    from diffsynth.testing.checks import (
        architectures,
        attention,
        calls,
        declarations,
        layouts,
        lora,
        pipelines,
        plugin,
        wrapping,
    )

    modules = (plugin, architectures, wrapping, lora, layouts, pipelines, declarations, calls, attention)
    return [check for module in modules for check in module.checks(subject)]


class CheckRunner:
    """Runs checks and stores their results. Each check runs at most once, when its result is first needed."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._by_name = {check.name: check for check in checks}
        assert len(self._by_name) == len(checks), "two checks have one name"
        self._errors: dict[str, BaseException | None] = {}

    def failed_dependency(self, check: Check) -> str | None:
        """Return the name of the first failed check that `check` depends on, directly or not, running those not yet
        run; None if all passed.
        """
        for name in check.after:
            earlier = self._by_name.get(name)
            if earlier is None:  # it is not run here
                continue
            if found := self.failed_dependency(earlier):
                return found
            if self.error(earlier) is not None:
                return name
        return None

    def error(self, check: Check) -> BaseException | None:
        """Return the exception that `check` raised, or None if it passed; the check is run at the first call only."""
        if check.name not in self._errors:
            try:
                check.run()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # the code of a plugin may raise anything
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
