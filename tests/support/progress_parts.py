"""A check of progress reports, for those of every load and call."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from diffsynth.core.progress import Progress


def check_parts(seen: Iterable[Progress]) -> None:
    """Fail unless each part of `seen` (reports of one stage and unit, from 0 on) rises, to a last report of all."""
    parts: dict[tuple[str, str], list[list[Progress]]] = {}
    for each in seen:
        found = parts.setdefault((each.stage, each.unit), [])
        if not found or (each.done == 0 and found[-1][-1].done > 0):
            found.append([])
        found[-1].append(each)
    for part in itertools.chain.from_iterable(parts.values()):
        done = [each.done for each in part]
        assert done == sorted(done), part
        assert part[-1].done == part[-1].total, part
