"""Key conversion as data: rules, and the plan that they make of one file's keys. No torch, no tensors.

A plan maps each target key to its sources and the op that makes it, so that loading to RAM and streaming from disk do
the same work. A key that no rule matches passes through under its own name.

In a pattern, `{n}` matches one integer and `{*}` the rest of the key; what they matched fills the same holes on the
other side.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from diffsynth.core.loader.key_differences import key_differences
from diffsynth.errors import KeyMismatch

Shape = tuple[int, ...]


class Rule:
    """One conversion: named sources to named targets, with the shapes of the targets."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Patterns of the keys it takes."""
        raise NotImplementedError

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns of the keys it makes."""
        raise NotImplementedError

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Shapes of the targets, from those of the sources.

        Raises:
            ValueError: the sources do not fit.
        """
        raise NotImplementedError

    def inverse(self, *sources: Shape) -> Rule:
        """The rule that undoes this one for sources of these shapes.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(f"{type(self).__name__} cannot be undone")


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name."""

    source: str
    target: str

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Unchanged."""
        return sources

    def inverse(self, *sources: Shape) -> Rename:
        """The names exchanged."""
        return Rename(self.target, self.source)


@dataclass(frozen=True)
class Drop(Rule):
    """A key that the network has no use for; `reason` is for the reader."""

    source: str
    reason: str = ""

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: ())

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Nothing."""
        return ()


@dataclass(frozen=True)
class Split(Rule):
    """One tensor cut along `dim` into several: equal parts, or of `sizes`."""

    source: str
    parts: tuple[str, ...]
    dim: int = 0
    sizes: tuple[int, ...] = ()

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: self.parts)

    def __post_init__(self) -> None:
        _axis(self, self.dim)

    def part_sizes(self, source: Shape) -> tuple[int, ...]:
        """Extent of each part along `dim`."""
        extent = source[self.dim]
        sizes = self.sizes or (extent // len(self.parts),) * len(self.parts)
        if sum(sizes) != extent:
            raise ValueError(f"{self.source} of shape {source} does not split into {sizes} along {self.dim}")
        return sizes

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """The source's, with each part's extent along `dim`."""
        (source,) = sources
        return tuple((*source[: self.dim], size, *source[self.dim + 1 :]) for size in self.part_sizes(source))

    def inverse(self, *sources: Shape) -> Fuse:
        """Join the parts."""
        return Fuse(self.parts, self.source, self.dim)


@dataclass(frozen=True)
class Fuse(Rule):
    """Several tensors joined along `dim`."""

    parts: tuple[str, ...]
    target: str
    dim: int = 0

    sources = property(lambda self: self.parts)
    targets = property(lambda self: (self.target,))

    def __post_init__(self) -> None:
        _axis(self, self.dim)

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """The first's, with the sum of extents along `dim`."""
        first = sources[0]
        if any(_without(shape, self.dim) != _without(first, self.dim) for shape in sources):
            raise ValueError(f"{self.target}: {sources} cannot be joined along {self.dim}")
        return ((*first[: self.dim], sum(shape[self.dim] for shape in sources), *first[self.dim + 1 :]),)

    def inverse(self, *sources: Shape) -> Split:
        """Cut into the parts again."""
        return Split(self.target, self.parts, self.dim, tuple(shape[self.dim] for shape in sources))


@dataclass(frozen=True)
class Reshape(Rule):
    """The same elements in another shape; one extent may be -1, and 0 is the source's extent at that place."""

    source: str
    target: str
    shape: Shape

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """`shape`, with -1 and 0 worked out."""
        (source,) = sources
        shape = tuple(extent or source[axis] for axis, extent in enumerate(self.shape))
        known = max(prod(extent for extent in shape if extent != -1), 1)
        full = tuple(prod(source) // known if extent == -1 else extent for extent in shape)
        if prod(full) != prod(source):
            raise ValueError(f"{self.source} of shape {source} does not reshape to {self.shape}")
        return (full,)

    def inverse(self, *sources: Shape) -> Reshape:
        """Back to the shape it had."""
        return Reshape(self.target, self.source, sources[0])


@dataclass(frozen=True)
class Permute(Rule):
    """The axes in another order."""

    source: str
    target: str
    order: tuple[int, ...]

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """The source's, in the new order."""
        (source,) = sources
        if sorted(self.order) != list(range(len(source))):
            raise ValueError(f"{self.source} of shape {source} has no axes {self.order}")
        return (tuple(source[axis] for axis in self.order),)

    def inverse(self, *sources: Shape) -> Permute:
        """The order undone."""
        return Permute(self.target, self.source, tuple(self.order.index(axis) for axis in range(len(self.order))))


@dataclass(frozen=True)
class ReorderChunks(Rule):
    """Equal chunks along `dim` in another order: (1, 0) exchanges shift and scale."""

    source: str
    target: str
    order: tuple[int, ...]
    dim: int = 0

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.target,))

    def __post_init__(self) -> None:
        _axis(self, self.dim)

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Unchanged."""
        (source,) = sources
        if source[self.dim] % len(self.order):
            raise ValueError(f"{self.source} of shape {source} has no {len(self.order)} equal chunks")
        return sources

    def inverse(self, *sources: Shape) -> ReorderChunks:
        """The order undone."""
        order = tuple(self.order.index(chunk) for chunk in range(len(self.order)))
        return ReorderChunks(self.target, self.source, order, self.dim)


@dataclass(frozen=True)
class Tie(Rule):
    """One tensor under two names, its own and `target`."""

    source: str
    target: str

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.source, self.target))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Both as the source."""
        return sources * 2

    def inverse(self, *sources: Shape) -> Apply:
        """One of the two, which must be equal."""
        return Apply(_equal, (self.source, self.target), self.source, lambda source, target: source)


@dataclass(frozen=True)
class Dequantize(Rule):
    """A low-precision weight and the scale beside it, multiplied out in fp32.

    The scale is one number, or has along each of its axes 1, the weight's extent, or a number of equal blocks.
    """

    weight: str
    scale: str
    target: str

    sources = property(lambda self: (self.weight, self.scale))
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """The weight's."""
        weight, scale = sources
        # Where blocks do not divide the weight, their size cannot be told.
        fits = len(scale) <= len(weight) and all(
            blocks and extent % blocks == 0 for extent, blocks in zip(weight, scale, strict=False)
        )
        if prod(scale) != 1 and not fits:
            raise ValueError(f"a scale of shape {scale} does not fit a weight of shape {weight}")
        return (weight,)


@dataclass(frozen=True)
class Constant(Rule):
    """A tensor that the file leaves out, filled with one value."""

    target: str
    shape: Shape
    value: float = 0.0

    sources = property(lambda self: ())
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """As declared."""
        return (self.shape,)


@dataclass(frozen=True)
class Apply(Rule):
    """Anything else: `function(*sources) -> target`; `shape(*source_shapes)` says what comes out."""

    function: Callable[..., Any]
    reads: tuple[str, ...]
    target: str
    shape: Callable[..., Shape]

    sources = property(lambda self: self.reads)
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """What `shape` says."""
        return (self.shape(*sources),)


@dataclass(frozen=True)
class Target:
    """How one target key is made: output `index` of `rule` over `sources`."""

    rule: Rule
    sources: tuple[str, ...]
    index: int
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """Target key -> how it is made, and the source keys that were dropped on purpose."""

    targets: dict[str, Target]
    dropped: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Target key -> shape."""
        return {key: target.shape for key, target in self.targets.items()}


def plan(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> Plan:
    """Apply rules to keys.

    Args:
        rules: the first that matches a key takes it.
        shapes: source key -> shape.

    Raises:
        KeyMismatch: a rule's sources are there only in part, do not fit, or two rules make one key.
    """
    targets: dict[str, Target] = {}
    dropped: list[str] = []
    taken: set[str] = set()
    ordered = sorted(shapes)
    for rule in rules:
        for holes in _matches(rule, ordered, taken):
            sources = tuple(fill(pattern, holes) for pattern in rule.sources)
            if missing := [key for key in sources if key not in shapes]:
                raise KeyMismatch(f"{type(rule).__name__} to {rule.targets} needs {missing[0]!r}, which is not there")
            taken.update(sources)
            if isinstance(rule, Drop):
                dropped.extend(sources)
            _add(targets, rule, holes, sources, shapes)
    for key in shapes:
        if key not in taken:
            _add(targets, Rename(key, key), {}, (key,), shapes)
    return Plan(targets, tuple(dropped))


def check(plan: Plan, wanted: Mapping[str, Shape], *, where: str, unused: str = "raise") -> list[str]:
    """Hold a plan to what a module wants, before any tensor is read.

    Args:
        wanted: parameter name -> shape.
        where: the file, for the message.
        unused: "raise", or "report" to return keys that the module does not know.

    Raises:
        KeyMismatch: missing or unknown keys, or other shapes.
    """
    differences = key_differences(plan.shapes, wanted)
    faults = differences if unused == "raise" else replace(differences, unknown=())
    if faults:
        raise KeyMismatch(f"{where} does not fit: {faults.describe()}")
    return list(differences.unknown)


def invert(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> list[Rule]:
    """Concrete rules that take the plan's targets back to a file of these keys and shapes; for saving.

    Raises:
        ValueError: a rule has no inverse.
    """
    done: dict[tuple[str, ...], Rule] = {}
    for key, target in plan(rules, shapes).targets.items():
        if not target.sources:
            done[(key,)] = Drop(key, "the file leaves it out")
        elif target.sources not in done:
            rule = concrete(target.rule, target.sources)
            done[target.sources] = rule.inverse(*(shapes[key] for key in target.sources))
    return list(done.values())


def concrete(rule: Rule, sources: tuple[str, ...]) -> Rule:
    """A rule with its holes filled as they are for these sources."""
    holes = match(rule.sources[0], sources[0]) or {}
    names: dict[str, Any] = {}
    for name, value in vars(rule).items():
        if isinstance(value, str):
            names[name] = fill(value, holes)
        elif isinstance(value, tuple) and value and all(isinstance(item, str) for item in value):
            names[name] = tuple(fill(item, holes) for item in value)
    return replace(rule, **names)  # type: ignore[type-var]


def _add(
    targets: dict[str, Target],
    rule: Rule,
    holes: Mapping[str, str],
    sources: tuple[str, ...],
    shapes: Mapping[str, Shape],
) -> None:
    try:
        made = rule.shapes(*(shapes[key] for key in sources))
    except (ValueError, IndexError) as error:
        raise KeyMismatch(f"{type(rule).__name__} of {sources}: {error}") from None
    for index, (pattern, shape) in enumerate(zip(rule.targets, made, strict=True)):
        key = fill(pattern, holes)
        if key in targets:
            raise KeyMismatch(f"{key!r} would be made twice: from {targets[key].sources} and from {sources}")
        targets[key] = Target(rule, sources, index, shape)


def _matches(rule: Rule, ordered: Sequence[str], taken: Container[str]) -> list[dict[str, str]]:
    """What fills the holes of a rule's patterns, for each set of sources that is there, among sorted keys."""
    if not rule.sources:
        return [{}]
    found: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for pattern in rule.sources:
        start = pattern.partition("{")[0]
        # Thousands of keys meet hundreds of rules: look only where the pattern's beginning is.
        for index in range(bisect.bisect_left(ordered, start), len(ordered)):
            key = ordered[index]
            if not key.startswith(start):
                break
            holes = match(pattern, key) if key not in taken else None
            if holes is not None:
                found.setdefault(tuple(sorted(holes.items())), holes)
    return list(found.values())


def match(pattern: str, key: str) -> dict[str, str] | None:
    """What fills a pattern's holes so that it is this key; None if nothing does."""
    if "{" not in pattern:
        return {} if pattern == key else None
    if not key.startswith(pattern.partition("{")[0]):
        return None
    found = _compiled(pattern).fullmatch(key)
    if found is None:
        return None
    return {"{*}" if name == "rest" else f"{{{name}}}": text for name, text in found.groupdict().items()}


def fill(pattern: str, holes: Mapping[str, str]) -> str:
    """A pattern with its holes filled."""
    for hole, text in holes.items():
        pattern = pattern.replace(hole, text)
    return pattern


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = []
    for part in re.split(r"(\{[a-z]\}|\{\*\})", pattern):
        if part == "{*}":
            parts.append("(?P<rest>.+)")
        elif re.fullmatch(r"\{[a-z]\}", part):
            parts.append(rf"(?P<{part[1]}>\d+)")
        else:
            parts.append(re.escape(part))
    return re.compile("".join(parts))


def _equal(source: Any, target: Any) -> Any:
    if not bool((source == target).all()):
        raise ValueError("two tensors that the file keeps as one are no longer equal")
    return source


def _axis(rule: Rule, dim: int) -> None:
    if dim < 0:
        raise ValueError(f"{type(rule).__name__}: dim={dim}; expected an axis counted from the front")


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])
