"""Recognition of a checkpoint's architecture and config from its header. No torch."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffsynth.core.loader import convert, quantization_notes, scaled
from diffsynth.core.loader.convert import Shape, normalized_key
from diffsynth.core.loader.explain import UnrecognizedFile, explain
from diffsynth.core.loader.header import (
    ARCHITECTURE_KEY,
    CONFIG_KEY,
    LAYOUT_KEY,
    Header,
    signature,
    strip_prefix,
    wrapper_prefixes,
)
from diffsynth.core.loader.layouts import own_names, rules_of
from diffsynth.core.loader.quantization_notes import Encoding
from diffsynth.errors import KeyMismatch, NotRunnable, Unrecognized, did_you_mean, shortened
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, resolve

TIERS = ("metadata", "signature", "structure")

_DEPTH = 3
"""Largest number of nested wrapper prefixes."""

_DICTS = 16
"""Largest number of dicts of a pickle in which components are looked for."""


@dataclass(frozen=True)
class Recognized:
    """A component that was recognised in a checkpoint.

    Args:
        architecture: its architecture.
        checkpoint: its layout; None for files that we saved under the architecture's own names.
        config: the architecture's config, with the sizes found in the file.
        tier: the tier that recognised it: "metadata", "signature" or "structure".
        prefix: the wrapper prefix of every key.
        keys: the file's keys, with their prefix, that the plan is made from: all that belong to no other component.
        extra: the keys among them that no published layout of the architecture has (structure tier only), and keys of
            the file that no component claims.
        scaling: rules for weights that have scales beside them; see `scaled`.
    """

    architecture: ArchitectureSpec
    checkpoint: CheckpointSpec | None
    config: Any
    tier: str
    prefix: str = ""
    keys: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    scaling: tuple[convert.Rule, ...] = ()

    @property
    def rules(self) -> Sequence[convert.Rule]:
        """A sequence of the `Rule`s that convert the file's keys to the architecture's own names, those of scaled
        weights first.
        """
        return (*self.scaling, *(rules_of(self.checkpoint) if self.checkpoint is not None else ()))

    def require_runnable(self, where: str) -> None:
        """Raise NotRunnable if the component is one that can only be named.

        Args:
            where: the file's name, for the message.

        Raises:
            NotRunnable: no installed package has the network.
        """
        if reason := self.architecture.not_runnable:
            raise NotRunnable(
                f"{where}: recognised, not yet runnable: {reason} ({self.architecture.name}). Load another model"
            )


@dataclass(frozen=True)
class _Candidate:
    """A match of the structure tier, before candidates for the same keys are compared."""

    recognized: Recognized
    claimed: frozenset[str]
    dropped: frozenset[str]


_Refusals = dict[tuple[str, str], str]
"""(layout, wrapper prefix) -> why the structure tier refused the file as that layout."""


def recognize(
    header: Header,
    architectures: Mapping[str, ArchitectureSpec],
    checkpoints: Sequence[CheckpointSpec],
    *,
    tiers: Sequence[str] = TIERS,
) -> list[Recognized]:
    """Return a list with a `Recognized` for each component (module of a pipeline) in a checkpoint; raise Unrecognized
    if none.

    Args:
        header: the checkpoint's header.
        architectures: architecture name -> its spec.
        checkpoints: the published layouts.
        tiers: the tiers to try, in this order.

    Raises:
        Unrecognized: no component was found; the message names the nearest layout and what differs, or says what the
            file is instead. Or a weight is quantised in a way that is not read.
        ValueError: an unknown tier.
    """
    refusals: _Refusals = {}
    found: list[Recognized] = []
    known, checkpoints = checkpoints, [checkpoint for checkpoint in checkpoints if not checkpoint.loras_only]
    packed = scaled.packed_format(header.tensors)
    encodings = {} if packed else quantization_notes.encodings(header.where, header.notes, header.tensors)
    rest = header
    for tier in tiers:
        if tier == "metadata":
            found += _by_metadata(rest, architectures, checkpoints, encodings)
        elif tier == "signature":
            found += _by_signature(rest, architectures, checkpoints, encodings)
        elif tier == "structure":
            found += [] if packed else _by_structure(rest, architectures, checkpoints, refusals, encodings)
        else:
            raise ValueError(f"tier {tier!r}: expected one of {', '.join(TIERS)}{did_you_mean(tier, TIERS)}")
        rest = _without(header, found)
        if not rest.tensors:
            break
    if not found:
        views = tuple(_views(header))
        raise Unrecognized(explain(UnrecognizedFile(header.where, header.shapes, known, refusals, views)))
    _reject_twice(header, found)
    if rest.tensors:
        found[0] = replace(found[0], extra=(*found[0].extra, *rest.tensors))
    return found


def _reject_twice(header: Header, found: Sequence[Recognized]) -> None:
    """Raise Unrecognized if two dicts of a trainer's pickle hold the same component, such as its weights and their
    average.
    """
    for one, other in itertools.combinations(found, 2):
        names = [
            next((prefix for prefix in header.prefixes if each.prefix.startswith(prefix)), "") for each in (one, other)
        ]
        same = {key.removeprefix(one.prefix) for key in one.keys} == {
            key.removeprefix(other.prefix) for key in other.keys
        }
        if all(names) and same and one.architecture is other.architecture:
            first, second = ("".join(f"[{part!r}]" for part in name[:-1].split(".")) for name in names)
            raise Unrecognized(
                f"{header.where} holds a {one.architecture.name} twice, as its {first} and its {second}. Choose one: "
                f"ModelConfig(state_dict=diffsynth.core.load_state_dict(FILE){second})"
            )


def _without(header: Header, found: Sequence[Recognized]) -> Header:
    """Return a `Header` without the keys that start with the prefix of a component in `found`; `header` itself if that
    is empty.
    """
    if not found:
        return header
    prefixes = tuple(recognized.prefix for recognized in found)
    return replace(
        header, tensors={key: info for key, info in header.tensors.items() if not key.startswith(prefixes)}, nested=None
    )


def _by_metadata(
    header: Header,
    architectures: Mapping[str, ArchitectureSpec],
    checkpoints: Sequence[CheckpointSpec],
    encodings: Mapping[str, Encoding],
) -> list[Recognized]:
    name = header.metadata.get(ARCHITECTURE_KEY)
    if name is None:
        return []
    if name not in architectures:
        from diffsynth.core.loader import first_party

        home = first_party.where_is_architecture(name) or "Install the family that has it."
        raise Unrecognized(
            f"{header.where}: saved as a {name}, which no installed plugin declares"
            f"{did_you_mean(name, architectures)}. {home}"
        )
    architecture = architectures[name]
    try:
        config = resolve(architecture.config)(**json.loads(header.metadata.get(CONFIG_KEY, "{}")))
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise Unrecognized(
            f"{header.where}: its {CONFIG_KEY} does not fit {architecture.config}: {type(error).__name__}: {error}"
        ) from None
    layout = header.metadata.get(LAYOUT_KEY)
    checkpoint = next((one for one in checkpoints if (one.name, one.architecture) == (layout, name)), None)
    if layout is not None and checkpoint is None:
        return []  # the layout is no longer declared; the other tiers compare the names themselves
    try:
        scaling, plan = _plan(rules_of(checkpoint) if checkpoint else (), header.shapes, encodings)
        _require(architecture, plan.shapes)
    except (KeyMismatch, ValueError) as error:
        raise Unrecognized(f"{header.where}: its metadata says that it is a {name}, but {error}") from None
    dropped = set(plan.dropped)
    keys = tuple(key for key in header.tensors if key not in dropped)
    return [Recognized(architecture, checkpoint, config, "metadata", keys=keys, scaling=scaling)]


def _by_signature(
    header: Header,
    architectures: Mapping[str, ArchitectureSpec],
    checkpoints: Sequence[CheckpointSpec],
    encodings: Mapping[str, Encoding],
) -> list[Recognized]:
    by_signature: dict[str, list[CheckpointSpec]] = {}
    for checkpoint in checkpoints:
        if checkpoint.signature and checkpoint.architecture in architectures:
            by_signature.setdefault(checkpoint.signature, []).append(checkpoint)
    found: list[Recognized] = []
    for prefix, shapes in _views(header):
        if any(prefix.startswith(other.prefix) for other in found):
            continue
        identity = signature(header.nested if header.nested is not None and not prefix else shapes)
        known = by_signature.get(identity, [])
        runnable = [each for each in known if not architectures[each.architecture].not_runnable]
        for checkpoint in runnable or known:
            architecture = architectures[checkpoint.architecture]
            scaling, plan = _plan(rules_of(checkpoint), shapes, _under(prefix, encodings))
            dropped = set(plan.dropped)
            keys = tuple(prefix + key for key in shapes if key not in dropped)
            config = _config(architecture, checkpoint, plan)
            found.append(Recognized(architecture, checkpoint, config, "signature", prefix, keys, scaling=scaling))
    return found


def _by_structure(
    header: Header,
    architectures: Mapping[str, ArchitectureSpec],
    checkpoints: Sequence[CheckpointSpec],
    refusals: _Refusals,
    encodings: Mapping[str, Encoding],
) -> list[Recognized]:
    known = _KnownNames(checkpoints)
    candidates = []
    alike = _alike(checkpoint for checkpoint in checkpoints if checkpoint.architecture in architectures)
    for prefix, shapes in _views(header):
        noted = _under(prefix, encodings)
        for first, *others in alike:
            try:
                candidates.append(_candidate(architectures[first.architecture], first, prefix, shapes, known, noted))
            except (KeyMismatch, ValueError, ArithmeticError, LookupError) as error:
                lacks = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
                refusals.update({(checkpoint.name, prefix): lacks for checkpoint in (first, *others)})
    return _weigh(header, candidates)


def _alike(checkpoints: Iterable[CheckpointSpec]) -> list[list[CheckpointSpec]]:
    """Return a list of lists of layouts (`CheckpointSpec`s) that agree in architecture, rules and config fields.

    A family may publish one set of names in many sizes.
    """
    found: dict[tuple[str, str, str], list[CheckpointSpec]] = {}
    for checkpoint in checkpoints:
        fields = repr(sorted(checkpoint.config.items()))
        found.setdefault((checkpoint.architecture, checkpoint.rules, fields), []).append(checkpoint)
    return list(found.values())


def _candidate(
    architecture: ArchitectureSpec,
    checkpoint: CheckpointSpec,
    prefix: str,
    shapes: Mapping[str, Shape],
    known: _KnownNames,
    encodings: Mapping[str, Encoding],
) -> _Candidate:
    """Return a `_Candidate`: the keys under one prefix, recognised as one layout; raise an error if they do not fit it.

    Raises:
        KeyMismatch, ValueError, LookupError: the keys do not fit the layout; the message says why.
    """
    rules = rules_of(checkpoint)
    _require_makeable(architecture, rules, shapes)
    scaling, plan = _plan(rules, shapes, encodings)
    _require(architecture, plan.shapes)
    config = _config(architecture, checkpoint, plan)
    claimed = frozenset(
        prefix + source
        for key, target in plan.targets.items()
        if known.has(architecture, key)
        for source in target.sources
    )
    recognized = Recognized(architecture, checkpoint, config, "structure", prefix, scaling=scaling)
    return _Candidate(recognized, claimed, frozenset(prefix + key for key in plan.dropped))


def _under(prefix: str, encodings: Mapping[str, Encoding]) -> Mapping[str, Encoding]:
    return {key.removeprefix(prefix): each for key, each in encodings.items() if key.startswith(prefix)}


def _plan(
    rules: Sequence[convert.Rule], shapes: Mapping[str, Shape], encodings: Mapping[str, Encoding]
) -> tuple[tuple[convert.Rule, ...], convert.Plan]:
    """Return a tuple: a tuple of rules for scaled weights (empty without any, or if `rules` dequantize), and the `Plan`
    that they and `rules` make.
    """
    scales = scaled.find(shapes, encodings)
    declared = any(isinstance(rule, convert.Dequantize) for rule in rules)
    if declared or not scales:
        return (), convert.plan(rules, shapes)
    scaling = scaled.rules(scales, convert.plan(rules, scales.without(shapes)))
    return scaling, convert.plan((*scaling, *rules), shapes)


def _weigh(header: Header, candidates: Sequence[_Candidate]) -> list[Recognized]:
    """Return a list of `Recognized`, most keys first, without candidates that claim no key or a key of one before;
    raise Unrecognized if two runnable architectures claim equal keys.

    Raises:
        Unrecognized: two architectures claim exactly the same keys, and both can be run.
    """
    chosen: list[_Candidate] = []
    for candidate in sorted(candidates, key=_rank):
        rivals = [other for other in chosen if other.claimed & candidate.claimed]
        for rival in rivals:
            names = {rival.recognized.architecture.name, candidate.recognized.architecture.name}
            if len(names) == 2 and rival.claimed == candidate.claimed and _rank(candidate)[1] == _rank(rival)[1]:
                raise Unrecognized(
                    f"{header.where}: claimed by {' and '.join(sorted(names))} alike; its shapes cannot tell which"
                )
        if candidate.claimed and not rivals:
            chosen.append(candidate)
    return [_settled(header, candidate, chosen) for candidate in chosen]


def _rank(candidate: _Candidate) -> tuple[int, bool, int]:
    """Return a key that sorts candidates: most claimed keys first, then those that can be run."""
    architecture = candidate.recognized.architecture
    return -len(candidate.claimed), bool(architecture.not_runnable), -len(candidate.dropped)


def _settled(header: Header, candidate: _Candidate, chosen: Sequence[_Candidate]) -> Recognized:
    others = frozenset[str]().union(*(other.claimed for other in chosen if other is not candidate))
    prefix = candidate.recognized.prefix
    keys = tuple(
        key for key in header.tensors if key.startswith(prefix) and key not in others and key not in candidate.dropped
    )
    return replace(candidate.recognized, keys=keys, extra=tuple(key for key in keys if key not in candidate.claimed))


class _KnownNames:
    """The parameter names that an architecture's published layouts have, with every number replaced by `N`."""

    def __init__(self, checkpoints: Sequence[CheckpointSpec]) -> None:
        self._checkpoints = checkpoints
        self._names: dict[str, frozenset[str]] = {}

    def has(self, architecture: ArchitectureSpec, key: str) -> bool:
        """Whether a layout of the architecture has this name, numbers aside; without any layout, whether a required
        name has the same text before its first dot.
        """
        if architecture.name not in self._names:
            layouts = (one for one in self._checkpoints if one.architecture == architecture.name)
            self._names[architecture.name] = frozenset[str]().union(*map(own_names, layouts))
        names = self._names[architecture.name]
        if names:
            return normalized_key(key) in names
        return any(key.split(".")[0] == pattern.split(".")[0] for pattern in architecture.required)


def _views(header: Header) -> Iterator[tuple[str, dict[str, Shape]]]:
    """Yield `(prefix, dict key -> shape)`: "" with all keys, then each wrapper prefix, at most three nested, and each
    dict of a pickle that holds tensors, with its keys, the prefix removed.
    """
    remaining = [("", header.shapes, 0)]
    remaining += [(prefix, strip_prefix(header.shapes, prefix), 0) for prefix in header.prefixes[:_DICTS]]
    seen = set()
    while remaining:
        prefix, shapes, depth = remaining.pop(0)
        if prefix in seen:
            continue
        seen.add(prefix)
        yield prefix, shapes
        if depth < _DEPTH:
            inner = wrapper_prefixes(shapes)
            remaining += [(prefix + each, strip_prefix(shapes, each), depth + 1) for each in inner]


def _config(architecture: ArchitectureSpec, checkpoint: CheckpointSpec, plan: convert.Plan) -> Any:
    config: Any = resolve(architecture.infer_config)(plan.shapes) if architecture.infer_config else None
    return replace(config, **checkpoint.config) if checkpoint.config else config


def _require_makeable(
    architecture: ArchitectureSpec, rules: Sequence[convert.Rule], shapes: Mapping[str, Shape]
) -> None:
    """Raise ValueError unless each required name (number 0 for `{n}`) is a key of `shapes` or a rule can make it from
    them.

    This cheap test refuses most files.

    Raises:
        ValueError: a required name that is no key and that no rule can make.
    """
    for pattern in architecture.required:
        name = pattern.replace("{n}", "0")
        if name not in shapes and not any(_can_make(rule, name, shapes) for rule in rules):
            raise ValueError(f"it lacks {name}")


def _can_make(rule: convert.Rule, name: str, shapes: Mapping[str, Shape]) -> bool:
    return any(
        all(convert.fill(source, holes) in shapes for source in rule.sources)
        for target in rule.targets
        if (holes := convert.match(target, name)) is not None
    )


def _require(architecture: ArchitectureSpec, own: Mapping[str, Shape]) -> None:
    for pattern in architecture.required:
        if "{n}" not in pattern:
            missing = [] if pattern in own else [pattern]
        else:
            before, _, after = pattern.partition("{n}")
            numbered = re.compile(re.escape(before) + r"(\d+)\.").match
            blocks = {int(match[1]) for key in own if (match := numbered(key))}
            # Among this many numbers one is missing if any is: a key with a huge number lists nothing.
            expected = range(min(max(blocks, default=0), len(blocks)) + 1)
            missing = [f"{before}{n}{after}" for n in expected if f"{before}{n}{after}" not in own]
        if missing:
            raise ValueError(f"it lacks {shortened(missing, 1)}")
