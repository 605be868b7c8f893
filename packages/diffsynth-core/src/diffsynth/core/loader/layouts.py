"""Published layouts: their keys, shapes and rules, and the way back from a network's parameters to them. No torch.

`convert.invert` undoes rules whose sources are known; `file_shapes` finds the sources from the targets.
"""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec, resolve


def layout_of(checkpoint: CheckpointSpec) -> Mapping[str, Shape]:
    """Return a dict key -> shape of the tensors in a published checkpoint file; empty if the plugin ships no list of
    them. Keys of nested dicts, which some pickles have, are joined by dots.
    """
    return _read(checkpoint.layout) if checkpoint.layout else {}


def nested_layout_of(checkpoint: CheckpointSpec) -> Mapping[str, Any]:
    """Return a dict key -> shape as `layout_of` does, with nested dicts where the file has them: the argument of
    `header.signature`.
    """
    return _tensors(checkpoint.layout) if checkpoint.layout else {}


def rules_of(checkpoint: CheckpointSpec) -> Sequence[convert.Rule]:
    """Return a sequence of the `Rule`s that convert a published file's tensors to the architecture's names; empty if
    not needed.
    """
    return resolve(checkpoint.rules) if checkpoint.rules else ()


def own_names(checkpoint: CheckpointSpec) -> frozenset[str]:
    """Return a frozenset of the parameter names that the rules make of a published layout's keys, with every number
    replaced by `N`; empty without a layout.
    """
    return _own_names(tuple(rules_of(checkpoint)), checkpoint.layout) if checkpoint.layout else frozenset()


@functools.lru_cache(maxsize=256)
def _own_names(rules: tuple[convert.Rule, ...], layout: str) -> frozenset[str]:
    # Every file that is recognised by structure asks for these names, and a family may have dozens of layouts.
    return frozenset(convert.normalized_key(own) for own in convert.plan(rules, _read(layout)).targets)


@functools.lru_cache(maxsize=256)
def _read(layout: str) -> Mapping[str, Shape]:
    return MappingProxyType(dict(_flat(_tensors(layout))))  # all callers share it


def _tensors(layout: str) -> dict[str, Any]:
    package, _, path = layout.partition(":")
    data = importlib.resources.files(package).joinpath(path).read_bytes()
    tensors: dict[str, Any] = json.loads(gzip.decompress(data))["tensors"]
    return tensors


def _flat(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Shape]]:
    """Yield (key, shape) of a layout's tensors; keys of nested dicts are joined by dots."""
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, tuple(value)


def file_shapes(
    rules: Sequence[convert.Rule], own: Mapping[str, Shape], published: Mapping[str, Shape] | None = None
) -> dict[str, Shape]:
    """Return a dict key -> shape of a file that `rules` would convert to a network with the parameters `own`; raise
    ValueError if it cannot be derived.

    Args:
        rules: the layout's rules.
        own: parameter name -> shape of the network.
        published: key -> shape of a file of that layout, of this size or another. It settles what the rules leave
            open, such as the sizes of the parts of a fused weight.

    Raises:
        ValueError: a rule has no inverse, the layout has keys that the network does not keep, or the size of a tensor
            cannot be derived.
    """
    published = published or {}
    found: dict[str, Shape] = {}
    taken: set[str] = set()
    for rule in rules:
        if isinstance(rule, convert.Drop):
            if lost := [key for key in published if convert.match(rule.source, key) is not None]:
                raise ValueError(f"the layout holds {lost[0]}, which the network does not keep")
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


def shapes_under(checkpoint: CheckpointSpec, sibling: CheckpointSpec) -> Mapping[str, Shape]:
    """Return a dict key -> shape of a network's file under the rules of `checkpoint`, derived from the published layout
    of `sibling`, which has the same architecture; empty if it cannot be derived.
    """
    return _shapes_under(checkpoint.rules, sibling.rules, sibling.layout)


@functools.lru_cache(maxsize=256)
def _shapes_under(rules: str, sibling_rules: str, layout: str) -> Mapping[str, Shape]:
    own = convert.plan(resolve(sibling_rules) if sibling_rules else (), _read(layout)).shapes
    try:
        return file_shapes(resolve(rules) if rules else (), own)
    except (ValueError, KeyMismatch):
        return {}


def _matches(rule: convert.Rule, own: Mapping[str, Shape], taken: set[str]) -> list[dict[str, str]]:
    """Return a list of dicts hole -> text, such as `{"{n}": "3"}`, that make all of a rule's targets keys of `own`, the
    first not in `taken`.
    """
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
    if isinstance(rule, convert.Rename | convert.Tie | convert.ReorderChunks | convert.Check):
        return (targets[0],)
    if isinstance(rule, convert.Split):
        extent = sum(shape[rule.dim] for shape in targets)
        return ((*targets[0][: rule.dim], extent, *targets[0][rule.dim + 1 :]),)
    if isinstance(rule, convert.Permute):
        return (tuple(targets[0][rule.order.index(axis)] for axis in range(len(rule.order))),)
    known = tuple(published[key] for key in sources if key in published)
    if isinstance(rule, convert.Fuse):
        return _fused_parts(rule, targets[0], known)
    if isinstance(rule, convert.Reshape):
        return (_shape_before_reshape(rule, targets[0], known),)
    raise ValueError(f"{type(rule).__name__} of {', '.join(sources)} cannot be undone")


def _fused_parts(rule: convert.Fuse, target: Shape, known: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Return a tuple of the shapes of a fused tensor's parts: its size along `dim` divided in the proportions of
    `known`; raise ValueError if that leaves a rest.
    """
    total = sum(shape[rule.dim] for shape in known)
    if len(known) != len(rule.parts) or any(shape[rule.dim] * target[rule.dim] % total for shape in known):
        raise ValueError(f"the sizes of {', '.join(rule.parts)} cannot be told from {rule.target}")
    sizes = (shape[rule.dim] * target[rule.dim] // total for shape in known)
    return tuple((*target[: rule.dim], size, *target[rule.dim + 1 :]) for size in sizes)


def _shape_before_reshape(rule: convert.Reshape, target: Shape, known: tuple[Shape, ...]) -> Shape:
    """Return the shape of a tensor before a reshape: `target` with as many axes of size 1 appended as the published
    shape has, else the published shape of equal size.
    """
    for shape in known:
        ones = len(shape) - len(target)
        if ones >= 0 and shape[len(target) :] == (1,) * ones and shape[: len(target)] == rule.shapes(shape)[0]:
            return target + (1,) * ones
        if prod(shape) == prod(target):
            return shape
    raise ValueError(f"the shape of {rule.source} cannot be told from {rule.target}")
