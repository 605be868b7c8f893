"""Key conversion as data: rules, and the plan that they make for the keys of one file. No torch, no tensors.

A plan maps each target key to its source keys and the rule that makes it, so that loading into memory and streaming
from disk follow the same plan. A key that no rule matches keeps its name.

In a pattern, the hole `{n}` matches one integer and `{*}` the rest of the key; the matched text fills the same holes of
the rule's other patterns.
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

_NUMBER = re.compile(r"\d+")


class Rule:
    """A conversion of source tensors to target tensors, with their key patterns and shapes."""

    @property
    def sources(self) -> tuple[str, ...]:
        """A tuple of key patterns, such as `"blocks.{n}.weight"`, of the tensors that the rule reads."""
        raise NotImplementedError

    @property
    def targets(self) -> tuple[str, ...]:
        """A tuple of key patterns, such as `"blocks.{n}.weight"`, of the tensors that the rule makes."""
        raise NotImplementedError

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with the shape of each tensor that the rule makes from sources of these shapes.

        Raises:
            ValueError: the rule does not apply to sources of these shapes.
        """
        raise NotImplementedError

    def inverse(self, *sources: Shape) -> Rule:
        """Return the `Rule` that undoes this one for sources of these shapes; raise ValueError if there is none.

        Raises:
            ValueError: the rule has no inverse.
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
        """Return a tuple with one shape, that of the source, because a renamed tensor keeps its shape."""
        return sources

    def inverse(self, *sources: Shape) -> Rename:
        """Return the `Rename` with source and target exchanged."""
        return Rename(self.target, self.source)


@dataclass(frozen=True)
class Drop(Rule):
    """Leave a key of the file out; `reason` documents why."""

    source: str
    reason: str = ""

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: ())

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return an empty tuple: no tensor is made from a dropped key."""
        return ()


@dataclass(frozen=True)
class Split(Rule):
    """One tensor split along `dim` into several: into equal parts, or into parts of `sizes`."""

    source: str
    parts: tuple[str, ...]
    dim: int = 0
    sizes: tuple[int, ...] = ()

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: self.parts)

    def __post_init__(self) -> None:
        _axis(self, self.dim)

    def part_sizes(self, source: Shape) -> tuple[int, ...]:
        """Return a tuple with the size of each part along axis `dim`, in elements: `sizes`, or equal ones; raise
        ValueError unless they add up to the axis.
        """
        extent = source[self.dim]
        sizes = self.sizes or (extent // len(self.parts),) * len(self.parts)
        if sum(sizes) != extent:
            raise ValueError(f"{self.source} of shape {source} does not split into {sizes} along {self.dim}")
        return sizes

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with the shape of each part of a split tensor: the source's, but with the part's size along
        axis `dim`; raise ValueError unless the sizes add up.
        """
        (source,) = sources
        return tuple((*source[: self.dim], size, *source[self.dim + 1 :]) for size in self.part_sizes(source))

    def inverse(self, *sources: Shape) -> Fuse:
        """Return the `Fuse` rule that joins the parts of a split tensor to the source again."""
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
        """Return a tuple with one shape, of the joined tensor: the first source's, but along `dim` the sum of all
        sources'; raise ValueError if the other axes differ.
        """
        first = sources[0]
        if any(_without(shape, self.dim) != _without(first, self.dim) for shape in sources):
            raise ValueError(f"{self.target}: {sources} cannot be joined along {self.dim}")
        return ((*first[: self.dim], sum(shape[self.dim] for shape in sources), *first[self.dim + 1 :]),)

    def inverse(self, *sources: Shape) -> Split:
        """Return the `Split` rule that splits a joined tensor into its parts again, with their sizes."""
        return Split(self.target, self.parts, self.dim, tuple(shape[self.dim] for shape in sources))


@dataclass(frozen=True)
class Reshape(Rule):
    """The same elements in another shape; one extent may be -1, and 0 keeps the source's extent of that axis."""

    source: str
    target: str
    shape: Shape

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with one shape: the declared one, with 0 replaced by the source's size and -1 by the rest;
        raise ValueError if the number of elements differs.
        """
        (source,) = sources
        shape = tuple(extent or source[axis] for axis, extent in enumerate(self.shape))
        known = max(prod(extent for extent in shape if extent != -1), 1)
        full = tuple(prod(source) // known if extent == -1 else extent for extent in shape)
        if prod(full) != prod(source):
            raise ValueError(f"{self.source} of shape {source} does not reshape to {self.shape}")
        return (full,)

    def inverse(self, *sources: Shape) -> Reshape:
        """Return the `Reshape` rule that gives the tensor the source's shape again."""
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
        """Return a tuple with one shape: the sizes of the source's axes in their new order; raise ValueError unless
        `order` names each axis once.
        """
        (source,) = sources
        if sorted(self.order) != list(range(len(source))):
            raise ValueError(f"{self.source} of shape {source} has no axes {self.order}")
        return (tuple(source[axis] for axis in self.order),)

    def inverse(self, *sources: Shape) -> Permute:
        """Return the `Permute` rule that puts the axes back into the source's order."""
        return Permute(self.target, self.source, tuple(self.order.index(axis) for axis in range(len(self.order))))


@dataclass(frozen=True)
class ReorderChunks(Rule):
    """Equal chunks along `dim` in another order; (1, 0) exchanges two halves, such as shift and scale."""

    source: str
    target: str
    order: tuple[int, ...]
    dim: int = 0

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.target,))

    def __post_init__(self) -> None:
        _axis(self, self.dim)

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with one shape, the source's; raise ValueError if axis `dim` does not divide into equal
        chunks.
        """
        (source,) = sources
        if source[self.dim] % len(self.order):
            raise ValueError(f"{self.source} of shape {source} has no {len(self.order)} equal chunks")
        return sources

    def inverse(self, *sources: Shape) -> ReorderChunks:
        """Return the `ReorderChunks` rule that puts the chunks back into the source's order."""
        order = tuple(self.order.index(chunk) for chunk in range(len(self.order)))
        return ReorderChunks(self.target, self.source, order, self.dim)


@dataclass(frozen=True)
class Tie(Rule):
    """One tensor under two names, `source` and `target`."""

    source: str
    target: str

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.source, self.target))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with the source's shape twice, for the tensor's two names."""
        return sources * 2

    def inverse(self, *sources: Shape) -> Apply:
        """Return an `Apply` rule that makes one tensor of the two: the first; applied to tensors that are not equal it
        raises ValueError.
        """
        return Apply(_equal, (self.source, self.target), self.source, lambda source, target: source)


@dataclass(frozen=True)
class Dequantize(Rule):
    """A low-precision weight multiplied by the scale beside it, in fp32.

    The scale is one number, or has along each of its axes 1, the weight's extent, or a number of equal blocks.
    """

    weight: str
    scale: str
    target: str

    sources = property(lambda self: (self.weight, self.scale))
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with one shape, the weight's; raise ValueError if the scale's shape does not fit it."""
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
    """A tensor that the file does not contain, filled with one value."""

    target: str
    shape: Shape
    value: float = 0.0

    sources = property(lambda self: ())
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with one shape, the declared one of the constant tensor."""
        return (self.shape,)


@dataclass(frozen=True)
class Apply(Rule):
    """Any other conversion: `function(*sources)` makes the target, `shape(*source_shapes)` returns its shape."""

    function: Callable[..., Any]
    reads: tuple[str, ...]
    target: str
    shape: Callable[..., Shape]

    sources = property(lambda self: self.reads)
    targets = property(lambda self: (self.target,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with one shape, the result of the rule's function `shape` for the sources' shapes."""
        return (self.shape(*sources),)


@dataclass(frozen=True)
class Check(Rule):
    """The same tensor under the same name, if `function` raises no error for its values."""

    source: str
    function: Callable[[Any], None]

    sources = property(lambda self: (self.source,))
    targets = property(lambda self: (self.source,))

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple with one shape, that of the source, because the tensor does not change."""
        return sources

    def inverse(self, *sources: Shape) -> Check:
        """Return the rule itself."""
        return self


@dataclass(frozen=True)
class Target:
    """A planned tensor: output `index` of `rule` applied to `sources`, of shape `shape`."""

    rule: Rule
    sources: tuple[str, ...]
    index: int
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """Target key -> planned tensor, and the source keys that the rules dropped."""

    targets: dict[str, Target]
    dropped: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """A dict target key -> shape (a tuple of ints) of the planned tensor."""
        return {key: target.shape for key, target in self.targets.items()}


def plan(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> Plan:
    """Return the `Plan` of a file: for each target key the rule and source keys that make it (a key that no rule takes
    keeps its name), and the dropped source keys.

    Args:
        rules: tried in order; the first that matches a key takes it.
        shapes: source key -> shape.

    Raises:
        KeyMismatch: some of a rule's sources are missing or have the wrong shape, or two rules make the same key.
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
    """Raise KeyMismatch unless a plan fits a module's parameters; return a list of planned keys that the module lacks,
    which raise, too, unless `unused` is "report".

    No tensor is read.

    Args:
        plan: the plan of the file.
        wanted: parameter name -> shape.
        where: the file's name, for the message.
        unused: "raise" counts keys that the module does not have as errors; "report" only returns them.

    Returns:
        The planned keys that the module does not have.

    Raises:
        KeyMismatch: keys are missing or unknown, or shapes differ.
    """
    differences = key_differences(plan.shapes, wanted)
    faults = differences if unused == "raise" else replace(differences, unknown=())
    if faults:
        raise KeyMismatch(f"{where} does not fit: {faults.describe()}")
    return list(differences.unknown)


def invert(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> list[Rule]:
    """Return a list of `Rule`s that convert the planned tensors back to a file with the keys and shapes of `shapes`,
    without those that `rules` drop; raise ValueError if one has no inverse.

    Args:
        rules: the rules that read the file.
        shapes: key -> shape of the file.

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
    """Return a copy of a `Rule` whose key patterns are filled, such as `{n}` with `3`, so that its sources are
    `sources`.
    """
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
    """Return a list of dicts hole -> text, such as `{"{n}": "3"}`, each of which makes a source pattern an unused key;
    `[{}]` for a rule without sources.

    Args:
        ordered: the keys, sorted.
        taken: keys that earlier rules have used.
    """
    if not rule.sources:
        return [{}]
    found: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for pattern in rule.sources:
        start = pattern.partition("{")[0]
        # With thousands of keys and hundreds of rules only the keys that start as the pattern does are compared.
        for index in range(bisect.bisect_left(ordered, start), len(ordered)):
            key = ordered[index]
            if not key.startswith(start):
                break
            holes = match(pattern, key) if key not in taken else None
            if holes is not None:
                found.setdefault(tuple(sorted(holes.items())), holes)
    return list(found.values())


def match(pattern: str, key: str) -> dict[str, str] | None:
    """Return a dict hole -> text, such as `"{n}"` -> `"3"`, that makes the pattern equal the key (empty for a pattern
    without holes); None if none does.
    """
    if "{" not in pattern:
        return {} if pattern == key else None
    if not key.startswith(pattern.partition("{")[0]):
        return None
    found = _compiled(pattern).fullmatch(key)
    if found is None:
        return None
    return {"{*}" if name == "rest" else f"{{{name}}}": text for name, text in found.groupdict().items()}


def normalized_key(key: str) -> str:
    """Return a tensor's key with every number replaced by `N`: `"blocks.3.weight"` gives `"blocks.N.weight"`."""
    return _NUMBER.sub("N", key)


def fill(pattern: str, holes: Mapping[str, str]) -> str:
    """Return a key pattern with its holes replaced by texts: `"blocks.{n}"` with `{"{n}": "3"}` gives `"blocks.3"`."""
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
