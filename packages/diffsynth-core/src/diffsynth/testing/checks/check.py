"""What a check is, and what it is about: one installed distribution and its declarations."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffsynth import _discovery
from diffsynth._discovery import Catalog, Problem
from diffsynth.errors import did_you_mean


@dataclass(frozen=True)
class Check:
    """One promise of a plugin.

    Args:
        name: the promise in words; unique within a plugin.
        run: raises if it does not hold: `AssertionError` with what to mend, whatever the plugin's own code raises, or
            `Unavailable` if this machine cannot tell.
        after: names of the checks without which this one says nothing.
    """

    name: str
    run: Callable[[], None] = field(repr=False)
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """An installed distribution: its plugins' modules, what they declare, and what is wrong with them."""

    distribution: str
    modules: tuple[str, ...]
    catalog: Catalog

    @classmethod
    def find(cls, distribution: str) -> Subject:
        """Look it up among the plugins that discovery may see.

        Raises:
            ValueError: no distribution of that name offers an allowed plugin.
        """
        catalog = _discovery.catalog()
        seen = {one.distribution for one in (*catalog.plugins, *catalog.problems)}
        wanted = _canonical(distribution)
        names = [name for name in seen if _canonical(name) == wanted]
        if not names:
            raise ValueError(
                f"{distribution!r} offers no plugin{did_you_mean(distribution, seen)} Install it first "
                f"(pip install -e .); it needs an entry point in the group {_discovery.GROUP!r}, "
                f"and DIFFSYNTH_PLUGINS, if set, must allow it."
            )
        entries = importlib.metadata.entry_points(group=_discovery.GROUP)
        modules = [entry.module for entry in entries if entry.dist is not None and entry.dist.name == names[0]]
        return cls(names[0], tuple(modules), catalog)

    @property
    def problems(self) -> list[Problem]:
        """What discovery found wrong with it."""
        return [problem for problem in self.catalog.problems if problem.distribution == self.distribution]

    @property
    def is_loaded(self) -> bool:
        """Whether its declarations are there to be looked at."""
        return any(plugin.distribution == self.distribution for plugin in self.catalog.plugins)

    def declared(self, kind: str) -> list[Any]:
        """Its declarations of one kind, `"architectures"`."""
        return [one.spec for one in getattr(self.catalog, kind) if one.distribution == self.distribution]


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
