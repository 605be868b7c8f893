"""Translation of a LoRA file's module names to those of a module: prefixes, underscores, other published layouts.

A layout's rules convert its weights to ours, and the changes of the weights follow the same rules. For a fused weight
`W = cat(Q, K, V)` the matrices of Q, K and V form a block diagonal; for a split weight each part gets its rows.
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
from diffsynth.core.lora.format import LoRA, LoRALayer
from diffsynth.errors import KeyMismatch, did_you_mean, shortened
from diffsynth.spec import CheckpointSpec

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_WEIGHT = ".weight"


class _Layout:
    """A layout whose module names a LoRA may have.

    Args:
        name: the layout's name, for the log.
        rules: the rules from the file's names to ours.
        shapes: parameter name -> shape of the module.
        published: key -> shape of a file of that layout; empty if there is none.
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
        """Names of modules with a weight, in the layout and in our own naming together, a frozenset."""
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
        """Mapping key -> shape of the tensors in a file of this layout, for the module's size; empty if it cannot be
        derived.
        """
        try:
            return file_shapes(self.rules, self._shapes, self._published)
        except (ValueError, KeyMismatch):
            return {}


@dataclass
class _Attempt:
    """The result of reading a LoRA with a layout's names.

    Args:
        layers: our module name -> change, for the layers that fit.
        known: how many of the LoRA's names the layout has.
        unknown: names that the layout or the module does not have.
        wrong: one text for each layer that does not fit otherwise.
    """

    layers: dict[str, LoRALayer] = field(default_factory=dict)
    known: int = 0
    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return bool(self.layers) and not self.unknown and not self.wrong


def fit(lora: LoRA, module: nn.Module, checkpoints: Sequence[CheckpointSpec] = (), *, architecture: str = "") -> LoRA:
    """Return a `LoRA` equal to `lora` under the names of the layers of `module`, which is not changed; raise
    KeyMismatch if any layer does not fit.

    Args:
        lora: a LoRA with the names of its file.
        module: the module to add it to; it may be on meta, and wrapped.
        checkpoints: the known layouts. Those of the module's architecture are tried, the others are used to say what
            the file is for.
        architecture: the module's architecture; empty tries the module's own names only.

    Raises:
        KeyMismatch: the module does not have a layer, or has it in another shape; the message says how many layers
            fit, and which architecture the file is for.
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
    """Return a tuple of the names of those linear layers whose name is, or ends with a dot and, one of `targets`, in
    the module's order.

    Args:
        module: a module on any device.
        targets: names or last parts of names, such as `"to_q"` and `"ffn.0"`.

    Raises:
        ValueError: a target that matches no linear layer.
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
    """Yield `_Layout`s (naming schemes): one with the module's own names, then one for each different set of rules of
    `checkpoints`.
    """
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
            attempt.wrong.append(f"{name} and another key both mean {known}")
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
    """Return a dict key -> shape of the weights that the LoRA leaves unchanged but that are fused with some that it
    changes, as far as their shapes are known.
    """
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
    """Return the `LoRALayer` of one of our weights, converted by the rule of `target` from `layers`, the changes of the
    weights that it is made of.

    Raises:
        ValueError: the rule does not keep a product of two matrices one.
    """
    rule, first = target.rule, layers[0]
    if isinstance(rule, convert.Rename | convert.Tie | convert.Dequantize | convert.Check):
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
    raise ValueError(f"the file's layout has it under {type(rule).__name__}, which cannot be applied to a LoRA")


def _complaint(
    lora: LoRA, module: nn.Module, best: _Attempt, checkpoints: Sequence[CheckpointSpec], architecture: str
) -> str:
    text = f"{lora.where} does not fit {type(module).__name__}, and nothing was changed: "
    text += f"{min(len(best.layers), best.known)} of its {len(lora.layers)} layers fit"
    if best.unknown:
        text += f"; it does not have {shortened(best.unknown, 4)}{_why_unknown(module, best.unknown[0])}"
    if best.wrong:
        text += f"; {shortened(best.wrong, 4)}"
    modules = {name: layer.shape[1] for name, layer in lora.layers.items()}
    base = base_of(modules, [each for each in checkpoints if each.architecture != architecture])
    return f"{text}. It is a LoRA for {base}" if base else f"{text}. Use a LoRA that was made for this model"


def _why_unknown(module: nn.Module, name: str) -> str:
    modules = dict(module.named_modules())
    known = without_prefix(name, modules, {each.replace(".", "_"): each for each in modules})
    if known is not None:
        return f" as a linear layer: {known} is a {type(modules[known]).__name__}, which LoRAs here do not change"
    return did_you_mean(name, [each for each, layer in modules.items() if isinstance(layer, nn.Linear)])
