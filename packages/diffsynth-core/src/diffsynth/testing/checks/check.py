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
        runs_network: whether it runs a network or a whole call; others build and compare only, and are quick.
    """

    name: str
    run: Callable[[], None] = field(repr=False)
    after: tuple[str, ...] = ()
    runs_network: bool = False


@dataclass(frozen=True)
class Subject:
    """An installed distribution, or one of its plugins: modules, declarations and problems.

    Args:
        distribution: its name.
        modules: of its plugins.
        catalog: of all plugins.
        plugin: name of the plugin that is tested; "" for all of the distribution.
    """

    distribution: str
    modules: tuple[str, ...]
    catalog: Catalog
    plugin: str = ""

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

    @classmethod
    def of_plugin(cls, plugin: str, distribution: str) -> Subject:
        """Return the `Subject` of one plugin of an installed distribution, which may have failed to load."""
        entries = plugin_entries()[0]
        modules = [each.module for each in entries if (each.distribution, each.name) == (distribution, plugin)]
        return cls(distribution, tuple(modules), _discovery.catalog(), plugin)

    @property
    def problems(self) -> list[Problem]:
        """List of the `Problem`s of this distribution: failures of its plugins and faults of its installation; empty if
        none.
        """
        return [problem for problem in self.catalog.problems if self.owns(problem)]

    @property
    def is_loaded(self) -> bool:
        """Whether at least one plugin of this distribution was loaded."""
        return any(
            plugin.distribution == self.distribution and self.plugin in ("", plugin.name)
            for plugin in self.catalog.plugins
        )

    def owns(self, one: Any) -> bool:
        """Whether a `Declared` or a `Problem` is of what is tested."""
        return one.distribution == self.distribution and self.plugin in ("", one.plugin)

    def declared(self, kind: str) -> list[Any]:
        """Return a list of the specs of one kind that this distribution declares; `"architectures"` gives
        `ArchitectureSpec`s.
        """
        return [one.spec for one in getattr(self.catalog, kind) if self.owns(one)]

    def runnable_architectures(self) -> list[Any]:
        """Return a list of the `ArchitectureSpec`s that this distribution declares, without `not_runnable` ones."""
        return [fact for fact in self.declared("architectures") if not fact.not_runnable]
