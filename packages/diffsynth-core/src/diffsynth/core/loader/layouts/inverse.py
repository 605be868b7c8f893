"""From an architecture's own names and shapes back to a published layout: what a file of that layout would hold.

`convert.invert` undoes rules whose sources are known; here the sources are found, from the targets. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from diffsynth.core.loader import convert

Shape = tuple[int, ...]


def file_shapes(
    rules: Sequence[convert.Rule], own: Mapping[str, Shape], published: Mapping[str, Shape] | None = None
) -> dict[str, Shape]:
    """Key -> shape of the file whose plan by these rules makes these parameters.

    Args:
        rules: of the layout.
        own: parameter name -> shape.
        published: key -> shape of a file of that layout, of this size or another; tells what rules do not, such as
            the parts of something fused.

    Raises:
        ValueError: a rule has no inverse, the layout has keys that the network does not keep, or the sizes of its
            tensors cannot be told.
    """
    published = published or {}
    found: dict[str, Shape] = {}
    taken: set[str] = set()
    for rule in rules:
        if isinstance(rule, convert.Drop):
            _refuse_dropped(rule, published)
        elif isinstance(rule, convert.Constant):
            taken.update(rule.targets)
        else:
            for holes in _matches(rule, own, taken):
                targets = tuple(convert.fill(pattern, holes) for pattern in rule.targets)
                sources = tuple(convert.fill(pattern, holes) for pattern in rule.sources)
                taken.update(targets)
                found |= zip(
                    sources, _source_shapes(rule, sources, [own[key] for key in targets], published), strict=True
                )
    found |= {key: shape for key, shape in own.items() if key not in taken}
    if convert.plan(rules, found).shapes != dict(own):
        raise ValueError("its rules do not lead back from there to the network's parameters")
    return found


def _refuse_dropped(rule: convert.Drop, published: Mapping[str, Shape]) -> None:
    if lost := [key for key in published if convert.match(rule.source, key) is not None]:
        raise ValueError(f"the layout holds {lost[0]}, which the network does not keep")


def _matches(rule: convert.Rule, own: Mapping[str, Shape], taken: set[str]) -> list[dict[str, str]]:
    """What fills the holes so that all targets are parameters that no rule before has taken."""
    first, *others = rule.targets
    candidates = (convert.match(first, key) for key in own if key not in taken)
    return [
        holes
        for holes in candidates
        if holes is not None and all(convert.fill(pattern, holes) in own for pattern in others)
    ]


def _source_shapes(
    rule: convert.Rule, sources: tuple[str, ...], targets: Sequence[Shape], published: Mapping[str, Shape]
) -> tuple[Shape, ...]:
    if isinstance(rule, convert.Rename | convert.Tie | convert.ReorderChunks):
        return (targets[0],)
    if isinstance(rule, convert.Split):
        extent = sum(shape[rule.dim] for shape in targets)
        return ((*targets[0][: rule.dim], extent, *targets[0][rule.dim + 1 :]),)
    if isinstance(rule, convert.Permute):
        return (tuple(targets[0][rule.order.index(axis)] for axis in range(len(rule.order))),)
    known = tuple(published[key] for key in sources if key in published)
    if isinstance(rule, convert.Fuse):
        return _parts(rule, targets[0], known)
    if isinstance(rule, convert.Reshape):
        return (_unshaped(rule, targets[0], known),)
    raise ValueError(f"{type(rule).__name__} of {', '.join(sources)} cannot be undone")


def _parts(rule: convert.Fuse, target: Shape, known: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """As large, relative to each other, as the published parts."""
    total = sum(shape[rule.dim] for shape in known)
    if len(known) != len(rule.parts) or any(shape[rule.dim] * target[rule.dim] % total for shape in known):
        raise ValueError(f"the sizes of {', '.join(rule.parts)} cannot be told from {rule.target}")
    sizes = (shape[rule.dim] * target[rule.dim] // total for shape in known)
    return tuple((*target[: rule.dim], size, *target[rule.dim + 1 :]) for size in sizes)


def _unshaped(rule: convert.Reshape, target: Shape, known: tuple[Shape, ...]) -> Shape:
    """The published shape, or axes of extent 1 behind the target's where the published file has such."""
    for shape in known:
        ones = len(shape) - len(target)
        if ones >= 0 and shape[len(target) :] == (1,) * ones and shape[: len(target)] == rule.shapes(shape)[0]:
            return target + (1,) * ones
        if prod(shape) == prod(target):
            return shape
    raise ValueError(f"the shape of {rule.source} cannot be told from {rule.target}")
