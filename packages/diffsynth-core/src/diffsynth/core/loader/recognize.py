"""Which architecture a checkpoint is, and with which config; from its header alone, without torch."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffsynth.core.loader import convert
from diffsynth.core.loader.header import Header, Shape, signature, strip_prefix, wrapper_prefixes
from diffsynth.errors import KeyMismatch, Unrecognized, did_you_mean
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, resolve

TIERS = ("metadata", "signature", "structure")

ARCHITECTURE_KEY = "diffsynth.architecture"
CONFIG_KEY = "diffsynth.config"
"""What our own files say of themselves in their metadata; the config is the JSON of its fields."""


_LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")


@dataclass(frozen=True)
class Recognized:
    """An answer.

    Args:
        architecture: what it is.
        checkpoint: the layout it has; None for files that we saved, which use the architecture's own names.
        config: its sizes.
        tier: how it was recognised: "metadata", "signature" or "structure".
        prefix: what stands before every key.
        keys: keys of the file, with their prefix, that its plan is made from: all that belong to no other component.
        extra: those of them that no published layout of the architecture has (structure only), and keys of the file
            that nobody claims.
    """

    architecture: ArchitectureSpec
    checkpoint: CheckpointSpec | None
    config: Any
    tier: str
    prefix: str = ""
    keys: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def rules(self) -> Sequence[convert.Rule]:
        """How its keys become the architecture's own."""
        return resolve(self.checkpoint.rules) if self.checkpoint is not None and self.checkpoint.rules else ()


@dataclass(frozen=True)
class _Candidate:
    """A structural match, before candidates for the same keys are weighed against each other."""

    recognized: Recognized
    claimed: frozenset[str]
    dropped: frozenset[str]


_Misses = dict[tuple[str, str], str]
"""Why structure said no, by checkpoint and prefix."""


def recognize(
    header: Header,
    architectures: Mapping[str, ArchitectureSpec],
    checkpoints: Sequence[CheckpointSpec],
    *,
    tiers: Sequence[str] = TIERS,
) -> list[Recognized]:
    """The components that a checkpoint holds, one at least.

    Args:
        architectures: by name.
        checkpoints: published layouts.
        tiers: which ways to try, in this order.

    Raises:
        Unrecognized: none; the message names the nearest layout and what differs, or what the file is instead.
    """
    misses: _Misses = {}
    found: list[Recognized] = []
    rest = header
    for tier in tiers:
        if tier == "metadata":
            found += _by_metadata(rest, architectures)
        elif tier == "signature":
            found += _by_signature(rest, architectures, checkpoints)
        elif tier == "structure":
            found += _by_structure(rest, architectures, checkpoints, misses)
        else:
            raise ValueError(f"tier {tier!r}: expected one of {', '.join(TIERS)}{did_you_mean(tier, TIERS)}")
        rest = _without(header, found)
        if not rest.tensors:
            break
    if not found:
        raise Unrecognized(_explain(header, misses, checkpoints))
    if rest.tensors:
        found[0] = replace(found[0], extra=(*found[0].extra, *rest.tensors))
    return found


def _without(header: Header, found: Sequence[Recognized]) -> Header:
    """The keys under no prefix that was recognised."""
    if not found:
        return header
    prefixes = tuple(recognized.prefix for recognized in found)
    return replace(
        header, tensors={key: info for key, info in header.tensors.items() if not key.startswith(prefixes)}, nested=None
    )


def _by_metadata(header: Header, architectures: Mapping[str, ArchitectureSpec]) -> list[Recognized]:
    name = header.metadata.get(ARCHITECTURE_KEY)
    if name is None:
        return []
    if name not in architectures:
        raise Unrecognized(
            f"{_where(header)}: saved as a {name}, which no installed plugin declares"
            f"{did_you_mean(name, architectures)}. Install the family that has it."
        )
    architecture = architectures[name]
    try:
        config = resolve(architecture.config)(**json.loads(header.metadata.get(CONFIG_KEY, "{}")))
    except (TypeError, ValueError) as error:
        raise Unrecognized(f"{_where(header)}: its {CONFIG_KEY} does not fit {architecture.config}: {error}") from None
    return [Recognized(architecture, None, config, "metadata", keys=tuple(header.tensors))]


def _by_signature(
    header: Header, architectures: Mapping[str, ArchitectureSpec], checkpoints: Sequence[CheckpointSpec]
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
        for checkpoint in by_signature.get(identity, ()):
            architecture = architectures[checkpoint.architecture]
            plan = convert.plan(_rules(checkpoint), shapes)
            keys = tuple(prefix + key for key in shapes if key not in set(plan.dropped))
            config = _config(architecture, checkpoint, plan)
            found.append(Recognized(architecture, checkpoint, config, "signature", prefix, keys))
    return found


def _by_structure(
    header: Header,
    architectures: Mapping[str, ArchitectureSpec],
    checkpoints: Sequence[CheckpointSpec],
    misses: _Misses,
) -> list[Recognized]:
    known = _KnownNames(checkpoints)
    candidates = []
    for prefix, shapes in _views(header):
        for checkpoint in checkpoints:
            architecture = architectures.get(checkpoint.architecture)
            if architecture is None:
                continue
            try:
                plan = convert.plan(_rules(checkpoint), shapes)
                _require(architecture, plan.shapes)
                config = _config(architecture, checkpoint, plan)
            except (KeyMismatch, ValueError, LookupError) as error:
                missing = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
                misses[checkpoint.name, prefix] = missing
                continue
            claimed = frozenset(
                prefix + source
                for key, target in plan.targets.items()
                if known.has(architecture, key)
                for source in target.sources
            )
            recognized = Recognized(architecture, checkpoint, config, "structure", prefix)
            candidates.append(_Candidate(recognized, claimed, frozenset(prefix + key for key in plan.dropped)))
    return _weigh(header, candidates)


def _weigh(header: Header, candidates: Sequence[_Candidate]) -> list[Recognized]:
    """Of candidates for the same keys, the one that explains most of them; as many as share no key.

    Raises:
        Unrecognized: two architectures explain the same keys equally well.
    """
    chosen: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (-len(each.claimed), -len(each.dropped))):
        rivals = [other for other in chosen if other.claimed & candidate.claimed]
        for rival in rivals:
            names = {rival.recognized.architecture.name, candidate.recognized.architecture.name}
            if len(names) == 2 and rival.claimed == candidate.claimed:
                raise Unrecognized(
                    f"{_where(header)}: claimed by {' and '.join(sorted(names))} alike; its shapes cannot tell which"
                )
        if candidate.claimed and not rivals:
            chosen.append(candidate)
    return [_settled(header, candidate, chosen) for candidate in chosen]


def _settled(header: Header, candidate: _Candidate, chosen: Sequence[_Candidate]) -> Recognized:
    others = frozenset[str]().union(*(other.claimed for other in chosen if other is not candidate))
    prefix = candidate.recognized.prefix
    keys = tuple(
        key for key in header.tensors if key.startswith(prefix) and key not in others and key not in candidate.dropped
    )
    return replace(candidate.recognized, keys=keys, extra=tuple(key for key in keys if key not in candidate.claimed))


class _KnownNames:
    """Which of an architecture's own names its published layouts have, with every index alike."""

    def __init__(self, checkpoints: Sequence[CheckpointSpec]) -> None:
        self._checkpoints = checkpoints
        self._names: dict[str, frozenset[str]] = {}

    def has(self, architecture: ArchitectureSpec, key: str) -> bool:
        """Whether a layout has it. Without any layout: whether something required starts alike."""
        if architecture.name not in self._names:
            self._names[architecture.name] = frozenset(
                _normal(own)
                for checkpoint in self._checkpoints
                if checkpoint.architecture == architecture.name and checkpoint.layout
                for own in convert.plan(_rules(checkpoint), _layout(checkpoint)).targets
            )
        names = self._names[architecture.name]
        if names:
            return _normal(key) in names
        return any(key.split(".")[0] == pattern.split(".")[0] for pattern in architecture.required)


def _views(header: Header) -> Iterator[tuple[str, dict[str, Shape]]]:
    """The keys as they are, then without each wrapper prefix that is there."""
    shapes = header.shapes
    for prefix in ("", *wrapper_prefixes(shapes)):
        yield prefix, strip_prefix(shapes, prefix)


def _config(architecture: ArchitectureSpec, checkpoint: CheckpointSpec, plan: convert.Plan) -> Any:
    config = resolve(architecture.infer_config)(plan.shapes)
    return replace(config, **checkpoint.config) if checkpoint.config else config


def _rules(checkpoint: CheckpointSpec) -> Sequence[convert.Rule]:
    return resolve(checkpoint.rules) if checkpoint.rules else ()


def _require(architecture: ArchitectureSpec, own: Mapping[str, Shape]) -> None:
    for pattern in architecture.required:
        if "{n}" not in pattern:
            missing = [] if pattern in own else [pattern]
        else:
            before, _, after = pattern.partition("{n}")
            blocks = {int(match[1]) for key in own if (match := re.match(re.escape(before) + r"(\d+)\.", key))}
            expected = range(max(blocks, default=0) + 1)
            missing = [f"{before}{n}{after}" for n in expected if f"{before}{n}{after}" not in own]
        if missing:
            raise ValueError(
                f"it lacks {missing[0]}" + (f" and {len(missing) - 1} like it" if len(missing) > 1 else "")
            )


def _explain(header: Header, misses: _Misses, checkpoints: Sequence[CheckpointSpec]) -> str:
    where, keys = _where(header), list(header.tensors)
    if not keys:
        return f"{where} holds no tensors."
    if kind := _other_kind(keys):
        return f"{where} is {kind}, not a model checkpoint."
    best: tuple[float, CheckpointSpec, str] | None = None
    views = {prefix: {_normal(key) for key in shapes} for prefix, shapes in _views(header)}
    for checkpoint in checkpoints:
        known = {_normal(key) for key in _layout(checkpoint)}
        for prefix, names in views.items():
            score = len(names & known) / max(len(names | known), 1)
            if score and (best is None or score > best[0]):
                best = (score, checkpoint, prefix)
    if best is None:
        return f"{where}: no installed architecture has keys like {keys[0]!r}. It has {len(keys)} tensors."
    score, checkpoint, prefix = best
    reason = misses.get((checkpoint.name, prefix), "")
    differing = _differences(strip_prefix(header.shapes, prefix), _layout(checkpoint))
    return (
        f"{where}: nearest is {checkpoint.name}, which shares {score:.0%} of its kinds of keys"
        + (f" under {prefix!r}" if prefix else "")
        + (f"; it is refused because {reason}" if reason else "")
        + (f". First differences: {'; '.join(differing)}" if differing else "")
    )


def _other_kind(keys: Sequence[str]) -> str:
    lora = sum(any(mark in key for mark in _LORA_MARKS) for key in keys)
    if lora > len(keys) / 2:
        return "a LoRA"
    if any(key.startswith(("optimizer", "exp_avg")) or ".exp_avg" in key for key in keys):
        return "an optimizer state"
    return ""


def _differences(shapes: Mapping[str, Shape], layout: Mapping[str, Shape]) -> list[str]:
    found = _first([key for key in layout if key not in shapes], "missing")
    found += _first([key for key in shapes if key not in layout], "not known")
    found += [
        f"{key} is {shapes[key]}, published {layout[key]}"
        for key in layout
        if shapes.get(key, layout[key]) != layout[key]
    ][:2]
    return found


def _first(keys: Sequence[str], what: str) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return [f"{', '.join(keys[:2])}{more} {'is' if len(keys) == 1 else 'are'} {what}"]


def _layout(checkpoint: CheckpointSpec) -> dict[str, Shape]:
    """Key -> shape of the published file; empty if the plugin ships none."""
    if not checkpoint.layout:
        return {}
    package, _, path = checkpoint.layout.partition(":")
    data = importlib.resources.files(package).joinpath(path).read_bytes()
    tensors = json.loads(gzip.decompress(data))["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


def _normal(key: str) -> str:
    return re.sub(r"\d+", "N", key)


def _where(header: Header) -> str:
    if not header.files:
        return "the given state_dict"
    return str(header.files[0]) + (f" and {len(header.files) - 1} more" if len(header.files) > 1 else "")
