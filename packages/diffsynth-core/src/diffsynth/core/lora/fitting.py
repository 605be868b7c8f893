"""Translation of a LoRA file's names to those of a module: prefixes, underscores, other published layouts.

A layout's rules convert its weights to ours, and the changes of the weights follow the same rules. For a fused weight
`W = cat(Q, K, V)` the matrices of Q, K and V form a block diagonal; for a split weight each part gets its rows. Names
and shapes are matched by `lora_match`, which explains files, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import nn

from diffsynth.core.loader import convert
from diffsynth.core.loader.lora_bases import base_of
from diffsynth.core.loader.lora_keys import LOW_RANK
from diffsynth.core.loader.lora_match import IDENTITIES, Match, Matched, layouts_of, match, without_prefix
from diffsynth.core.loader.reader.ops import apply_rule
from diffsynth.core.lora.arithmetic import stacked
from diffsynth.core.lora.changes import Factors, LoRALayer, ParameterChange, Part
from diffsynth.core.lora.format import LoRA
from diffsynth.errors import KeyMismatch, did_you_mean, shortened
from diffsynth.spec import CheckpointSpec
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

Shape = tuple[int, ...]

_WEIGHT = ".weight"
_LOW_RANK_RULES = (*IDENTITIES, convert.Split, convert.ReorderChunks, convert.Fuse)


def fit(
    lora: LoRA,
    module: nn.Module,
    checkpoints: Sequence[CheckpointSpec] = (),
    *,
    architecture: str = "",
    widened: Sequence[str] = (),
    strict: bool = True,
) -> LoRA:
    """Return a `LoRA` equal to `lora` under the names of the parameters of `module`, which is not changed.

    Args:
        lora: a LoRA with the names of its file.
        module: the module to add it to; it may be on meta, and wrapped.
        checkpoints: the known layouts. Those of the module's architecture are tried, the others are used to say what
            the file is for.
        architecture: the module's architecture; empty tries the module's own names only.
        widened: names of linear layers that the LoRA may give more inputs (`widen` does), or change in their first
            inputs only.
        strict: False leaves out what the module does not have and lists it in `left`.

    Raises:
        KeyMismatch: nothing fits, or, if strict, the module does not have a layer or has it in another shape; the
            message says how many changes fit, and which architecture the file is for.
    """
    own, linear = _own_shapes(module)
    factors = lora.factors
    found = match(
        [each.change for each in factors],
        own,
        layouts_of(own, [each for each in checkpoints if each.architecture == architecture]),
        {f"{name}{_WEIGHT}" for name in widened},
    )
    by_change = {id(each.change): each for each in factors}
    _settle_doubles(found, by_change, own, lora.where)
    if not found.targets or (strict and not found.fits):
        raise KeyMismatch(_complaint(lora, module, found, checkpoints))
    layers: dict[str, LoRALayer] = {}
    others: dict[str, ParameterChange] = {}
    for key, matched in found.targets.items():
        name = key.removesuffix(_WEIGHT)
        if name in linear and key != name and all(map(_is_low_rank, matched)):
            if matched[0].shape[1] > own[key][1]:
                parts = tuple(_part(each, by_change) for each in matched)
                others[key] = ParameterChange(parts, inputs=matched[0].shape[1])
                continue
            made = [_padded(converted_layer(each, by_change), own[key][1]) for each in matched]
            layers[name] = stacked(name, made) if made[1:] else made[0]
        else:
            others[key] = ParameterChange(tuple(_part(each, by_change) for each in matched))
    left = {name: reason or f"{type(module).__name__} does not have it" for name, reason in found.left.items()}
    return replace(lora, layers=layers, others=others, left={**lora.left, **left})


def what_fits(
    lora: LoRA, module: nn.Module, checkpoints: Sequence[CheckpointSpec], architecture: str, widened: Sequence[str] = ()
) -> set[str]:
    """Return a set of the names of those changes of `lora` that fit `module`; arguments as for `fit`."""
    left = what_does_not_fit(lora, module, checkpoints, architecture, widened)
    return {each.change.name for each in lora.factors} - left.keys()


def what_does_not_fit(
    lora: LoRA, module: nn.Module, checkpoints: Sequence[CheckpointSpec], architecture: str, widened: Sequence[str] = ()
) -> dict[str, str]:
    """Return a dict name -> reason of those changes of `lora` that do not fit `module`, an empty text for those of
    which the module does not have the parameter; arguments as for `fit`.
    """
    own, _ = _own_shapes(module)
    layouts = layouts_of(own, [each for each in checkpoints if each.architecture == architecture])
    changes = [each.change for each in lora.factors]
    return match(changes, own, layouts, {f"{name}{_WEIGHT}" for name in widened}).left


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


def _own_shapes(module: nn.Module) -> tuple[dict[str, Shape], set[str]]:
    """Return a tuple: a dict parameter name -> shape, and the names of the linear layers."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return shapes | {f"{name}{_WEIGHT}": tuple(part.weight.shape) for name, part in linear.items()}, set(linear)


def _settle_doubles(found: Match, by_change: Mapping[int, Factors], own: Mapping[str, Shape], where: str) -> None:
    """Remove the second of two equal changes of a parameter under different names, as files have that hold the same
    LoRA for two programs. Different ones add up if one is a part of a fused weight, else they do not fit.
    """
    equal = 0
    for key in found.twice:
        kept: dict[tuple[str, ...], list[Matched]] = {}
        seen: dict[tuple[str, ...], torch.Tensor] = {}
        for matched in found.targets[key]:
            modules = tuple(change.module for change in matched.changes)
            kept.setdefault(modules, []).append(matched)
            shape = own[key] if prod(own[key]) == prod(matched.shape) else matched.shape
            delta = _part(matched, by_change).difference(torch.zeros(shape))
            seen[modules] = seen[modules] + delta if modules in seen else delta
        for modules in list(kept)[1:]:
            if any(_is_close(seen[modules], seen[each]) for each in kept if each != modules):
                del kept[modules]
                equal += 1
        if len(kept) > 1 and not any(_joins(each) for each in found.targets[key]):
            names = " and from ".join(shortened(modules, 2) for modules in kept)
            text = f"{key!r} would be made twice, with different values: from {names}"
            found.left |= {change.name: text for each in found.targets[key] for change in each.changes}
            del found.targets[key]
        else:
            found.targets[key] = [matched for each in kept.values() for matched in each]
    if equal:
        logger.info("%s has %d changes under two names, equal; each is added once", where, equal)


def _is_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-4 * first.abs().max())


def _joins(matched: Matched) -> bool:
    return isinstance(matched.rule, convert.Split | convert.Fuse)


def _is_low_rank(matched: Matched) -> bool:
    plain = all(
        change.kind == LOW_RANK and not change.is_dora and len(change.shape) == 2 and "mid" not in change.keys
        for change in matched.changes
    )
    return plain and isinstance(matched.rule, _LOW_RANK_RULES)


def _part(matched: Matched, by_change: Mapping[int, Factors]) -> Part:
    sources = tuple(by_change[id(each)] if not isinstance(each, tuple) else each for each in matched.sources)
    return Part(matched.rule, matched.index, sources)


def converted_layer(matched: Matched, by_change: Mapping[int, Factors]) -> LoRALayer:
    """Return the `LoRALayer` of one weight, converted by the rule of `matched` from the changes of the weights that it
    is made of.

    Args:
        matched: a rule that keeps, splits, joins or reorders weights, and the changes.
        by_change: `id` of each of the changes -> its tensors.
    """
    rule = matched.rule
    layers = [
        LoRALayer(torch.zeros(0, each[1]), torch.zeros(each[0], 0)) if isinstance(each, tuple) else _matrices(
            by_change[id(each)]
        )
        for each in matched.sources
    ]  # fmt: skip
    first = layers[0]
    if isinstance(rule, IDENTITIES):
        return first
    if isinstance(rule, convert.Split | convert.ReorderChunks):
        if rule.dim == 0:
            return replace(first, up=apply_rule(rule, (first.up,), matched.index))
        return replace(first, down=apply_rule(rule, (first.down,), matched.index))
    assert isinstance(rule, convert.Fuse)
    ups = [layer.up if layer.scale == 1 else layer.scaled_up() for layer in layers]
    downs = [layer.down for layer in layers]
    if rule.dim == 0:
        return LoRALayer(torch.cat(downs), torch.block_diag(*ups))
    return LoRALayer(torch.block_diag(*downs), torch.cat(ups, dim=1))


def _padded(layer: LoRALayer, inputs: int) -> LoRALayer:
    """Return a `LoRALayer` that changes the first of `inputs` inputs as `layer` does."""
    more = inputs - layer.shape[1]
    return replace(layer, down=torch.nn.functional.pad(layer.down, (0, more))) if more else layer


def _matrices(factors: Factors) -> LoRALayer:
    return LoRALayer(factors.tensors["down"], factors.tensors["up"], factors.alpha)


def _complaint(lora: LoRA, module: nn.Module, found: Match, checkpoints: Sequence[CheckpointSpec]) -> str:
    text = f"{lora.where} does not fit {type(module).__name__}, and nothing was changed: "
    text += f"{found.total - len(found.left)} of its {found.total} layers fit"
    if unknown := found.unknown:
        text += f"; it does not have {shortened(unknown, 4)}{_why_unknown(module, unknown[0])}"
    if found.wrong:
        text += f"; {shortened(found.wrong, 4)}"
    changes = [each.change for each in lora.factors]
    base = base_of(changes, checkpoints) if 2 * len(found.left) > found.total else ""
    partly = " strict=False adds those that fit." if found.targets else ""
    return f"{text}. It is a LoRA for {base}.{partly}" if base else (
        f"{text}. Use a LoRA that was made for this model.{partly}"
    )  # fmt: skip


def _why_unknown(module: nn.Module, name: str) -> str:
    modules = dict(module.named_modules())
    known = without_prefix(name, modules, {each.replace(".", "_"): each for each in modules})
    if known is not None:
        return f": its {known} is a {type(modules[known]).__name__} without this parameter"
    return did_you_mean(name, [each for each, layer in modules.items() if isinstance(layer, nn.Linear)])
