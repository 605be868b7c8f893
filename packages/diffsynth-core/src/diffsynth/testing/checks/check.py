"""Classes `Check`, a single test, and `Subject`, the installed distribution that is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffsynth import _discovery
from diffsynth._discovery import Catalog, Problem
from diffsynth._entry_points import GROUP, normalized, plugin_entries
from diffsynth.errors import did_you_mean


@dataclass(frozen=True)
class Check:
    """One requirement on a plugin.

    Args:
        name: the requirement in words; unique within a plugin.
        run: function that raises if the requirement is not met: `AssertionError` with the change to make, an exception
            of the plugin's own code, or `Unavailable` if this machine cannot run the check.
        after: names of the checks that this one depends on.
    """

    name: str
    run: Callable[[], None] = field(repr=False)
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """An installed distribution: the modules of its plugins, their declarations and their problems."""

    distribution: str
    modules: tuple[str, ...]
    catalog: Catalog

    @classmethod
    def find(cls, distribution: str) -> Subject:
        """Return the `Subject` (name, plugin modules and declarations to check) of the installed distribution of that
        name.

        Raises:
            ValueError: no distribution of that name has an allowed plugin.
        """
        catalog = _discovery.catalog()
        seen = {one.distribution for one in (*catalog.plugins, *catalog.problems)}
        wanted = normalized(distribution)
        names = [name for name in seen if normalized(name) == wanted]
        if not names:
            raise ValueError(
                f"{distribution!r} has no plugin{did_you_mean(distribution, seen)} Install it first "
                f"(pip install -e .); it needs an entry point in the group {GROUP!r}, "
                f"and DIFFSYNTH_PLUGINS, if set, must allow it."
            )
        modules = [entry.module for entry in plugin_entries()[0] if entry.distribution == names[0]]
        return cls(names[0], tuple(modules), catalog)

    @property
    def problems(self) -> list[Problem]:
        """List of the `Problem`s of this distribution: failures of its plugins and faults of its installation; empty if
        none.
        """
        return [problem for problem in self.catalog.problems if problem.distribution == self.distribution]

    @property
    def is_loaded(self) -> bool:
        """Whether at least one plugin of this distribution was loaded."""
        return any(plugin.distribution == self.distribution for plugin in self.catalog.plugins)

    def declared(self, kind: str) -> list[Any]:
        """Return a list of the specs of one kind that this distribution declares; `"architectures"` gives
        `ArchitectureSpec`s.
        """
        return [one.spec for one in getattr(self.catalog, kind) if one.distribution == self.distribution]

    def runnable_architectures(self) -> list[Any]:
        """Return a list of the `ArchitectureSpec`s that this distribution declares, without `not_runnable` ones."""
        return [fact for fact in self.declared("architectures") if not fact.not_runnable]
