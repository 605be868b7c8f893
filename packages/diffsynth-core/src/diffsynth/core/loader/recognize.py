"""Which architecture a checkpoint is, and with which config; from its header alone, without torch."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffsynth.core.loader import convert
from diffsynth.core.loader.header import WRAPPER_PREFIXES, Header, Shape, signature, strip_prefix
from diffsynth.errors import KeyMismatch, Unrecognized, did_you_mean
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, resolve

TIERS = ("metadata", "signature", "structure")

ARCHITECTURE_KEY = "diffsynth.architecture"
CONFIG_KEY = "diffsynth.config"
"""What our own files say of themselves in their metadata; the config is the JSON of its fields."""


@dataclass(frozen=True)
class Recognized:
    """An answer.

    Args:
        architecture: what it is.
        checkpoint: the layout it has; None for files that we saved, which use the architecture's own names.
        config: its sizes.
        tier: how it was recognised: "metadata", "signature" or "structure".
        prefix: what stands before every key.
        extra: keys that the layout does not know (structure only).
    """

    architecture: ArchitectureSpec
    checkpoint: CheckpointSpec | None
    config: Any
    tier: str
    prefix: str = ""
    extra: tuple[str, ...] = ()

    @property
    def rules(self) -> Sequence[convert.Rule]:
        """How its keys become the architecture's own."""
        return resolve(self.checkpoint.rules) if self.checkpoint is not None and self.checkpoint.rules else ()


@dataclass
class _Miss:
    checkpoint: CheckpointSpec
    reason: str
    shared: float = 0.0
    details: list[str] = field(default_factory=list)


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
    misses: list[_Miss] = []
    for tier in tiers:
        if tier == "metadata":
            found = _by_metadata(header, architectures)
        elif tier == "signature":
            found = _by_signature(header, architectures, checkpoints)
        else:
            found = _by_structure(header, architectures, checkpoints, misses)
        if found:
            return found
    raise Unrecognized(_explain(header, misses, checkpoints))


def _by_metadata(header: Header, architectures: Mapping[str, ArchitectureSpec]) -> list[Recognized]:
    name = header.metadata.get(ARCHITECTURE_KEY)
    if name is None:
        return []
    if name not in architectures:
        raise Unrecognized(
            f"{_where(header)}: saved as a {name}, which no installed plugin declares{did_you_mean(name, architectures)}. "
            f"Install the family that has it."
        )
    architecture = architectures[name]
    try:
        config = resolve(architecture.config)(**json.loads(header.metadata.get(CONFIG_KEY, "{}")))
    except (TypeError, ValueError) as error:
        raise Unrecognized(
            f"{_where(header)}: its {CONFIG_KEY} does not fit {architecture.config}: {error}"
        ) from None
    return [Recognized(architecture, None, config, "metadata")]


def _by_signature(
    header: Header, architectures: Mapping[str, ArchitectureSpec], checkpoints: Sequence[CheckpointSpec]
) -> list[Recognized]:
    known = {checkpoint.signature for checkpoint in checkpoints if checkpoint.signature}
    for prefix, shapes in _views(header):
        identity = signature(header.nested if header.nested is not None and not prefix else shapes)
        if identity not in known:
            continue
        found = []
        for checkpoint in checkpoints:
            if checkpoint.signature == identity and checkpoint.architecture in architectures:
                architecture = architectures[checkpoint.architecture]
                config = _config(architecture, checkpoint, shapes)
                found.append(Recognized(architecture, checkpoint, config, "signature", prefix))
        return found
    return []


def _by_structure(
    header: Header,
    architectures: Mapping[str, ArchitectureSpec],
    checkpoints: Sequence[CheckpointSpec],
    misses: list[_Miss],
) -> list[Recognized]:
    for prefix, shapes in _views(header):
        candidates = []
        for checkpoint in checkpoints:
            architecture = architectures.get(checkpoint.architecture)
            if architecture is None:
                continue
            try:
                own = convert.plan(_rules(checkpoint), shapes).shapes
                _require(architecture, own)
                config = _config(architecture, checkpoint, shapes)
            except (KeyMismatch, ValueError, KeyError) as error:
                misses.append(_Miss(checkpoint, str(error)))
                continue
            extra = tuple(key for key in own if not _belongs(key, architecture, own))
            candidates.append(Recognized(architecture, checkpoint, config, "structure", prefix, extra))
        names = {candidate.architecture.name for candidate in candidates}
        if len(names) > 1:
            raise Unrecognized(
                f"{_where(header)}: claimed by {' and '.join(sorted(names))}; say which by model_configs"
            )
        if candidates:
            return [min(candidates, key=lambda candidate: len(candidate.extra))]
    return []


def _views(header: Header) -> Iterator[tuple[str, dict[str, Shape]]]:
    """The keys as they are, then without each wrapper prefix that is there."""
    shapes = header.shapes
    yield "", shapes
    for prefix in WRAPPER_PREFIXES:
        if stripped := strip_prefix(shapes, prefix):
            yield prefix, stripped


def _config(architecture: ArchitectureSpec, checkpoint: CheckpointSpec, shapes: Mapping[str, Shape]) -> Any:
    own = convert.plan(_rules(checkpoint), shapes).shapes
    config = resolve(architecture.infer_config)(own)
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


def _belongs(key: str, architecture: ArchitectureSpec, own: Mapping[str, Shape]) -> bool:
    """Whether the key starts like something that the architecture requires; what it really is, loading will tell."""
    return any(key.split(".")[0] == pattern.split(".")[0] for pattern in architecture.required)


def _explain(header: Header, misses: Sequence[_Miss], checkpoints: Sequence[CheckpointSpec]) -> str:
    where, keys = _where(header), list(header.tensors)
    if not keys:
        return f"{where} holds no tensors."
    if kind := _other_kind(keys):
        return f"{where} is {kind}, not a model checkpoint."
    best: tuple[float, CheckpointSpec, dict[str, Shape]] | None = None
    normal = {_normal(key) for key in keys}
    for checkpoint in checkpoints:
        layout = _layout(checkpoint)
        known = {_normal(key) for key in layout}
        for prefix in ("", *WRAPPER_PREFIXES):
            ours = {key.removeprefix(prefix) for key in normal}
            score = len(ours & known) / max(len(ours | known), 1)
            if score and (best is None or score > best[0]):
                best = (score, checkpoint, layout)
    if best is None:
        return f"{where}: no installed architecture has keys like {keys[0]!r}. It has {len(keys)} tensors."
    score, checkpoint, layout = best
    reason = next((miss.reason for miss in misses if miss.checkpoint is checkpoint), "")
    differing = _differences(header.shapes, layout)
    return (
        f"{where}: nearest is {checkpoint.name}, which shares {score:.0%} of its kinds of keys"
        + (f"; it is refused because {reason}" if reason else "")
        + (f". First differences: {'; '.join(differing)}" if differing else "")
    )


def _other_kind(keys: Sequence[str]) -> str:
    lora = sum(any(mark in key for mark in (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")) for key in keys)
    if lora > len(keys) / 2:
        return "a LoRA"
    if any(key.startswith(("optimizer", "exp_avg")) or ".exp_avg" in key for key in keys):
        return "an optimizer state"
    return ""


def _differences(shapes: Mapping[str, Shape], layout: Mapping[str, Shape]) -> list[str]:
    found = [f"{key} is missing" for key in layout if key not in shapes][:2]
    found += [f"{key} is not known" for key in shapes if key not in layout][:2]
    found += [
        f"{key} is {shapes[key]}, published {layout[key]}"
        for key in layout
        if shapes.get(key, layout[key]) != layout[key]
    ][:2]
    return found


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
