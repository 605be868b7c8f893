"""Check of installed plugins without running a network, by the quick checks of the conformance suite.

`diffsynth plugins --check` prints its reports. The conformance suite itself, which a plugin's author runs, also runs
networks and calls.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from dataclasses import dataclass

from diffsynth import _discovery
from diffsynth.errors import Unavailable, did_you_mean
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.plugin import SeveralFaults
from diffsynth.testing.suite import CheckRunner, checks_of_subject


@dataclass(frozen=True)
class Fault:
    """A fault of a plugin.

    Args:
        plugin, distribution, version: of the plugin.
        check: the requirement that is not met, in words.
        error: what was found, and what was expected, in one line.
        next_action: what to do, a sentence.
        traceback: formatted traceback; empty if the check itself raised.
    """

    plugin: str
    distribution: str
    version: str
    check: str
    error: str
    next_action: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version}): {self.check}: {self.error}. {self.next_action}"


@dataclass(frozen=True, kw_only=True)
class PluginReport:
    """The result of all quick checks of a plugin.

    Args:
        plugin, distribution, version: of the plugin.
        passed: number of checks that it passed.
        skipped: check -> why it was not made: another one failed, or this machine cannot make it.
        faults: what is wrong.
        seconds: that the checks took.
    """

    plugin: str
    distribution: str
    version: str
    passed: int
    skipped: dict[str, str]
    faults: tuple[Fault, ...]
    seconds: float


def plugin_names() -> list[str]:
    """Return a list of the names of all installed plugins, those that cannot be loaded included."""
    return list(dict.fromkeys(name for name, *_ in _installed()))


def check_plugin(name: str) -> list[PluginReport]:
    """Return a list of one `PluginReport` for each installed plugin of a name; there are several if distributions
    declare one name.

    Args:
        name: of the plugin, or of its distribution.

    Raises:
        ValueError: no installed plugin has the name.
    """
    found = [each for each in _installed() if name in each[:2]]
    if not found:
        raise ValueError(f"there is no plugin {name!r}{did_you_mean(name, plugin_names())}. Run: diffsynth plugins")
    return [_report(*each) for each in found]


def _installed() -> list[tuple[str, str, str]]:
    catalog = _discovery.catalog()
    loaded = [(one.name, one.distribution, one.version) for one in catalog.plugins]
    return list(dict.fromkeys([*loaded, *((one.plugin, one.distribution, one.version) for one in catalog.problems)]))


def _report(plugin: str, distribution: str, version: str) -> PluginReport:
    started = time.perf_counter()
    checks = [each for each in checks_of_subject(Subject.of_plugin(plugin, distribution)) if not each.runs_network]
    runner = CheckRunner(checks)
    passed, skipped, faults = 0, {}, []
    for check in checks:
        with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints is no part of the report
            dependency = runner.failed_dependency(check)
            error = None if dependency else runner.error(check)
        if dependency:
            skipped[check.name] = f"cannot be judged while {dependency!r} fails"
        elif isinstance(error, Unavailable):
            skipped[check.name] = str(error)
        elif error is None:
            passed += 1
        else:
            faults += _faults(check, error, plugin, distribution, version)
    return PluginReport(
        plugin=plugin,
        distribution=distribution,
        version=version,
        passed=passed,
        skipped=skipped,
        faults=tuple(faults),
        seconds=time.perf_counter() - started,
    )


def _faults(check: Check, error: BaseException, plugin: str, distribution: str, version: str) -> list[Fault]:
    is_ours = isinstance(error, AssertionError) and str(error)
    texts = error.faults if isinstance(error, SeveralFaults) else (str(error) if is_ours else _described(error),)
    details = "" if is_ours else "".join(traceback.format_exception(error))
    action = (
        f"Correct it, or report it to the authors of {distribution}. Without the plugin: pip uninstall {distribution}"
    )
    return [
        Fault(plugin, distribution, version, check.name, " ".join(text.split()).rstrip("."), action, details)
        for text in texts
    ]


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
