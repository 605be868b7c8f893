"""Small shapes under published key names. No weights here.

The keys are those of the layout file, and they go forward through the rules, as they do when a file is loaded. A rule
is never inverted: a wrong rule must not be able to write the file that excuses it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Rule, Shape
from diffsynth.core.loader.layouts.published import layout_of, rules_of
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec

_MOST_PROPOSALS = 100_000

_LARGEST_UNREAD = 16
"""Extent of what rules drop, where nothing that stays has the like: the text tower beside a vision tower."""


def tiny_shapes(checkpoint: CheckpointSpec, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """Published key -> small shape, in the layout's order, so that the file fills a small module.

    A key stays if something it feeds is wanted, or if the rules drop it on purpose.

    Args:
        checkpoint: a layout. One without rules may do without a layout file: its keys are the module's own.
        wanted: own key -> shape of the small module.

    Raises:
        ValueError: the published keys are not known, or no small shape of a key goes through its rule.
        KeyMismatch: what comes out of the rules is not what the module wants.
    """
    rules, published = rules_of(checkpoint), layout_of(checkpoint)
    if not published:
        if rules:
            raise ValueError(
                f"checkpoint {checkpoint.name!r} has rules and no layout, so its published key names are not known. "
                f"Give its CheckpointSpec a layout."
            )
        return dict(wanted)
    plan = convert.plan(rules, published)
    steps: dict[tuple[str, ...], list[str]] = {}
    for key, target in plan.targets.items():
        steps.setdefault(target.sources, []).append(key)
    small: dict[str, Shape] = {}
    for sources, keys in steps.items():
        if sources and any(key in wanted for key in keys):
            ends = [(plan.targets[key].shape, wanted.get(key)) for key in keys]
            whole = [published[source] for source in sources]
            try:
                shrunk = _shrink(plan.targets[keys[0]].rule, whole, ends)
            except ValueError as error:
                raise ValueError(f"checkpoint {checkpoint.name!r}, key {sources[0]!r}: {error}") from None
            small.update(zip(sources, shrunk, strict=True))
    learned = _learn((published[key], small[key]) for key in small)
    small |= {
        key: tuple(learned.get(extent, min(extent, _LARGEST_UNREAD)) for extent in published[key])
        for key in plan.dropped
    }
    ordered = {key: small[key] for key in published if key in small}
    convert.check(convert.plan(rules, ordered), wanted, where=f"the tiny file of checkpoint {checkpoint.name!r}")
    return ordered


def _shrink(rule: Rule, whole: Sequence[Shape], ends: Sequence[tuple[Shape, Shape | None]]) -> tuple[Shape, ...]:
    """Small sources from which the rule makes the small targets; a target of None may come out as it likes.

    Raises:
        ValueError: none do.
    """
    ratios = [pair for large, small in ends if small is not None for pair in zip(large, small, strict=False)]
    extents = [extent for shape in whole for extent in shape]
    proposals = itertools.product(*(_proposed(extent, ratios) for extent in extents))
    for proposal in itertools.islice(proposals, _MOST_PROPOSALS):
        rest = iter(proposal)
        sources = tuple(tuple(itertools.islice(rest, len(shape))) for shape in whole)
        if _makes(rule, sources, [small for _, small in ends]):
            return sources
    small = ", ".join(str(target) for _, target in ends)
    raise ValueError(
        f"no small shape in place of {whole[0]} comes out of {type(rule).__name__} as {small}. "
        f"Change ModelSpec.tiny, or write the rule so that it follows the shapes it is given."
    )


def _proposed(extent: int, ratios: Sequence[tuple[int, int]]) -> list[int]:
    """Extents to try in place of one: as the targets of this extent shrink, in proportion to others, or unchanged."""
    same = [small for large, small in ratios if large == extent]
    scaled = [extent * small // large for large, small in ratios if large and extent * small % large == 0]
    return list(dict.fromkeys([*same, *scaled, extent]))


def _makes(rule: Rule, sources: tuple[Shape, ...], targets: Sequence[Shape | None]) -> bool:
    try:
        made = rule.shapes(*sources)
    except (ValueError, IndexError, KeyMismatch):
        return False
    return all(small in (None, shape) for shape, small in zip(made, targets, strict=True))


def _learn(pairs: Iterable[tuple[Shape, Shape]]) -> dict[int, int]:
    """Published extent -> the small one that most often stands in its place."""
    seen: dict[int, Counter[int]] = {}
    for large, small in pairs:
        for before, after in zip(large, small, strict=True):
            seen.setdefault(before, Counter())[after] += 1
    return {before: counted.most_common(1)[0][0] for before, counted in seen.items()}
