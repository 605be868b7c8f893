"""The published layout that a file comes nearest to, and where the two part. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffsynth.core.loader.key_differences import key_differences
from diffsynth.core.loader.layouts.published import layout_of, normal
from diffsynth.spec import CheckpointSpec

Shape = tuple[int, ...]

_NEAR = 0.1
"""Of all kinds of keys, the share in common below which nothing is near."""


def explain(
    where: str,
    views: Sequence[tuple[str, Mapping[str, Shape]]],
    checkpoints: Sequence[CheckpointSpec],
    refusals: Mapping[tuple[str, str], str],
) -> str:
    """The nearest layout, how many keys it shares, why it was refused, and the first differing keys and shapes.

    Args:
        where: the file.
        views: its keys with each wrapper prefix taken off, and that prefix.
        checkpoints: published layouts.
        refusals: why structure said no, by checkpoint and prefix.
    """
    best: tuple[float, CheckpointSpec, str, Mapping[str, Shape]] | None = None
    kinds = {prefix: {normal(key) for key in shapes} for prefix, shapes in views}
    for checkpoint in checkpoints:
        published = {normal(key) for key in layout_of(checkpoint)}
        for prefix, shapes in views:
            score = len(kinds[prefix] & published) / max(len(kinds[prefix] | published), 1)
            if score > _NEAR and (best is None or score > best[0]):
                best = (score, checkpoint, prefix, shapes)
    if best is None:
        keys = list(views[0][1])
        shown = " and ".join(repr(key) for key in (keys[0], keys[-1]) if key)
        return (
            f"{where}: no installed architecture has keys like {shown}. It has {len(keys)} tensors. "
            f"Is its family installed? Run: diffsynth plugins"
        )
    _, checkpoint, prefix, shapes = best
    layout = layout_of(checkpoint)
    shared = sum(key in shapes for key in layout)
    reason = refusals.get((checkpoint.name, prefix), "")
    differing = key_differences(shapes, layout)
    return (
        f"{where}: nearest is {checkpoint.name}, which shares {shared} of its {len(layout)} keys"
        + (f" under {prefix!r}" if prefix else "")
        + (f"; it is refused because {reason}" if reason else "")
        + (f". Differences: {differing.describe(limit=2)}" if differing else "")
        + "."
    )
