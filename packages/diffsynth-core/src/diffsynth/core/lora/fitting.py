"""From the module names of a LoRA file to those of a module: prefixes, underscores, and other published layouts.

A layout's rules say how its weights become ours; the change of a weight follows from them. With `W = cat(Q, K, V)` the
changes of Q, K and V stand on a block diagonal; where ours are split, each part gets its rows.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from diffsynth.core.loader import convert
from diffsynth.core.loader.layouts import file_shapes, layout_of, rules_of
from diffsynth.core.loader.lora_bases import base_of, without_prefix
from diffsynth.core.loader.reader.ops import apply_rule
from diffsynth.core.lora.layer import LoRA, LoRALayer
from diffsynth.errors import KeyMismatch, did_you_mean, shortened
from diffsynth.spec import CheckpointSpec

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_WEIGHT = ".weight"


class _Layout:
    """A layout as a LoRA sees it.

    Args:
        name: for the log.
        rules: from the file's names to ours; what a file holds besides does not matter here.
        shapes: of the module's parameters, by our names.
        published: key -> shape of a file of that layout, if there is one.
    """

    def __init__(
        self, name: str, rules: Sequence[convert.Rule], shapes: Mapping[str, Shape], published: Mapping[str, Shape]
    ) -> None:
        self.name = name
        self.rules = [rule for rule in rules if not isinstance(rule, convert.Drop)]
        self._shapes = shapes
        self._published = published

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Modules as the file names them, and as we do: rules leave some as they are."""
        sources = (
            convert.fill(source, holes)
            for rule in self.rules
            for target in rule.targets
            for key in self._shapes
            if (holes := convert.match(target, key)) is not None
            for source in rule.sources
        )
        return frozenset(key.removesuffix(_WEIGHT) for key in (*self._shapes, *sources) if key.endswith(_WEIGHT))

    @functools.cached_property
    def file_shapes(self) -> Mapping[str, Shape]:
        """Of the file's tensors, at this module's size; empty if they cannot be told."""
        try:
            return file_shapes(self.rules, self._shapes, self._published)
        except (ValueError, KeyMismatch):
            return {}


@dataclass
class _Attempt:
    """A LoRA read as one of a layout: what fits, and what does not."""

    layers: dict[str, LoRALayer] = field(default_factory=dict)
    known: int = 0
    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return bool(self.layers) and not self.unknown and not self.wrong


def fit(lora: LoRA, module: nn.Module, checkpoints: Sequence[CheckpointSpec] = (), *, architecture: str = "") -> LoRA:
    """A LoRA by a module's own names; nothing is changed, and nothing is left out.

    Args:
        lora: by the names of its file.
        module: that it is for; it may be on meta, and wrapped.
        checkpoints: every layout that is known: those of the module's architecture may be the file's, and the others
            help to say what the file is for.
        architecture: of the module; empty knows no other layout than the module's own names.

    Raises:
        KeyMismatch: a layer that the module does not have, or has in another shape; the message says how much fits,
            and which architecture the file is for.
    """
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    own = {f"{name}{_WEIGHT}": tuple(part.weight.shape) for name, part in layers.items()}
    attempts = []
    for layout in _layouts(module, [each for each in checkpoints if each.architecture == architecture]):
        attempt = _attempt(lora, own, layout)
        if attempt.fits:
            logger.debug("%s has the names of layout %s", lora.where, layout.name)
            return replace(lora, layers=attempt.layers)
        attempts.append(attempt)
    best = max(attempts, key=lambda attempt: (attempt.known, len(attempt.layers)))
    raise KeyMismatch(_complaint(lora, module, best, checkpoints, architecture))


def target_layers(module: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """The linear layers whose names are these, or end in a dot and one of these; in the module's order.

    Args:
        module: on any device.
        targets: `"to_q"`, `"ffn.0"`.

    Raises:
        ValueError: one that no linear layer is called by.
    """
    layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            last = [name.rpartition(".")[2] for name in layers]
            raise ValueError(
                f"{type(module).__name__} has no linear layer {target!r}{did_you_mean(target, (*layers, *last))}"
            )
    return tuple(name for name in layers if f".{name}".endswith(tuple(f".{target}" for target in targets)))


def _layouts(module: nn.Module, checkpoints: Sequence[CheckpointSpec]) -> Iterator[_Layout]:
    """The module's own names, then each set of rules once."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    yield _Layout("its own", (), shapes, {})
    by_rules = {checkpoint.rules: checkpoint for checkpoint in reversed(checkpoints) if checkpoint.rules}
    for checkpoint in reversed(by_rules.values()):
        yield _Layout(checkpoint.name, rules_of(checkpoint), shapes, layout_of(checkpoint))


def _attempt(lora: LoRA, own: Mapping[str, Shape], layout: _Layout) -> _Attempt:
    attempt = _Attempt()
    underscored = {name.replace(".", "_"): name for name in layout.names}
    named: dict[str, LoRALayer] = {}
    for name, layer in lora.layers.items():
        known = without_prefix(name, layout.names, underscored)
        if known is None:
            attempt.unknown.append(name)
        elif f"{known}{_WEIGHT}" in named:
            attempt.wrong.append(f"{name} is {known}, which another key names, too")
        else:
            named[f"{known}{_WEIGHT}"] = layer
    attempt.known = len(named)
    absent = _absent_parts(layout, named)
    try:
        plan = convert.plan(layout.rules, {key: layer.shape for key, layer in named.items()} | absent)
    except KeyMismatch as error:
        attempt.wrong.append(str(error))
        return attempt
    for key, target in plan.targets.items():
        if not target.sources:
            continue  # a constant of the layout
        if key not in own:
            attempt.unknown.append(key.removesuffix(_WEIGHT))
        elif target.shape != own[key]:
            attempt.wrong.append(f"{key} is {own[key]}, the LoRA is for {target.shape}")
        else:
            sources = [named[each] if each in named else _no_change(absent[each]) for each in target.sources]
            try:
                attempt.layers[key.removesuffix(_WEIGHT)] = _converted(target, sources)
            except ValueError as error:
                attempt.wrong.append(f"{key}: {error}")
    return attempt


def _absent_parts(layout: _Layout, named: Mapping[str, LoRALayer]) -> dict[str, Shape]:
    """Parts of fused weights that the LoRA leaves alone while it changes others of them -> their shape, if told."""
    absent: dict[str, Shape] = {}
    for rule in layout.rules:
        if not isinstance(rule, convert.Fuse):
            continue
        matches = (convert.match(pattern, key) for pattern in rule.parts for key in named)
        for holes in (each for each in matches if each is not None):
            parts = [convert.fill(pattern, holes) for pattern in rule.parts]
            lacking = [part for part in parts if part not in named]
            absent |= {part: layout.file_shapes[part] for part in lacking if part in layout.file_shapes}
    return absent


def _no_change(shape: Shape) -> LoRALayer:
    return LoRALayer(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))


def _converted(target: convert.Target, layers: Sequence[LoRALayer]) -> LoRALayer:
    """What a change of the sources is to the target.

    Raises:
        ValueError: a rule that two thin matrices cannot follow.
    """
    rule, first = target.rule, layers[0]
    if isinstance(rule, convert.Rename | convert.Tie | convert.Dequantize):
        return first
    if isinstance(rule, convert.Split | convert.ReorderChunks):
        if rule.dim == 0:
            return replace(first, up=apply_rule(rule, (first.up,), target.index))
        return replace(first, down=apply_rule(rule, (first.down,), target.index))
    if isinstance(rule, convert.Fuse):
        ups = [layer.up if layer.scale == 1 else layer.scaled_up() for layer in layers]
        downs = [layer.down for layer in layers]
        if rule.dim == 0:
            return LoRALayer(torch.cat(downs), torch.block_diag(*ups))
        return LoRALayer(torch.block_diag(*downs), torch.cat(ups, dim=1))
    raise ValueError(f"the file's layout has it under {type(rule).__name__}, which a LoRA cannot follow")


def _complaint(
    lora: LoRA, module: nn.Module, best: _Attempt, checkpoints: Sequence[CheckpointSpec], architecture: str
) -> str:
    told = f"{lora.where} does not fit {type(module).__name__}, and nothing was changed: "
    told += f"{min(len(best.layers), best.known)} of its {len(lora.layers)} layers fit"
    if best.unknown:
        told += f"; it does not have {shortened(best.unknown, 4)}{_why_unknown(module, best.unknown[0])}"
    if best.wrong:
        told += f"; {shortened(best.wrong, 4)}"
    modules = {name: layer.shape[1] for name, layer in lora.layers.items()}
    base = base_of(modules, [each for each in checkpoints if each.architecture != architecture])
    return f"{told}. It is a LoRA for {base}" if base else f"{told}. Use a LoRA that was made for this model"


def _why_unknown(module: nn.Module, name: str) -> str:
    parts = dict(module.named_modules())
    known = without_prefix(name, parts, {each.replace(".", "_"): each for each in parts})
    if known is not None:
        return f" as a linear layer: {known} is a {type(parts[known]).__name__}, which LoRAs here do not change"
    return did_you_mean(name, [each for each, part in parts.items() if isinstance(part, nn.Linear)])
