"""LoRAs under the keys of other programs: the module names of a published layout, and the spelling of a program.

`fit` leads from a file's names to a module's; this leads back, by the inverse of the same rules. The change of a fused
weight is split into its parts, and the changes of parts are joined as a block diagonal.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.layouts import file_shapes, layout_of, rules_of
from diffsynth.core.loader.lora_match import Matched
from diffsynth.core.lora.changes import LoRALayer, factors_of
from diffsynth.core.lora.fitting import converted_layer
from diffsynth.core.lora.format import LoRA, require_plain
from diffsynth.errors import KeyMismatch, did_you_mean, shortened
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling

SPELLINGS = (
    LoRASpelling(
        name="comfyui", prefix="diffusion_model.", down="lora_down.weight", up="lora_up.weight", alpha="alpha"
    ),
    LoRASpelling(name="diffusers", prefix="transformer."),
    LoRASpelling.kohya("lora_unet_"),
    LoRASpelling(name="peft", prefix="base_model.model."),
)
"""The usual spellings, with an architecture's own module names."""


def spelling_of(name: str, architecture: ArchitectureSpec) -> LoRASpelling:
    """Return the `LoRASpelling` of a program for LoRAs of an architecture: the architecture's own, else the usual one.

    Raises:
        ValueError: there is none of that name.
    """
    known = {each.name: each for each in (*SPELLINGS, *architecture.lora_spellings)}
    if name not in known:
        raise ValueError(
            f"spelling={name!r}: LoRAs of {architecture.name} are written as {', '.join(sorted(known))}"
            f"{did_you_mean(name, known)}"
        )
    return known[name]


def spelled(
    lora: LoRA, spelling: LoRASpelling, own: Mapping[str, Shape], checkpoints: Sequence[CheckpointSpec] = ()
) -> dict[str, Tensor]:
    """Return a dict key -> tensor: a LoRA in the spelling of a program.

    Args:
        lora: a plain LoRA with the names of the module's layers.
        spelling: the program's keys.
        own: parameter name -> shape of the module.
        checkpoints: the known layouts, among them that of the spelling.

    Raises:
        KeyMismatch: changes that are no plain LoRA, or of a layer that the program does not know.
        ValueError: the spelling's layout is not among `checkpoints`, or cannot be derived from the module's shapes.
    """
    require_plain(lora)
    made = lora
    if spelling.layout:
        checkpoint = next((each for each in checkpoints if each.name == spelling.layout), None)
        if checkpoint is None:
            raise ValueError(
                f"the spelling {spelling.name} names the layout {spelling.layout!r}, which is not declared"
            )
        made = in_layout(lora, checkpoint, own)
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, layer in made.layers.items():
        if spelling.layers and not any(fnmatch.fnmatchcase(name, pattern) for pattern in spelling.layers):
            if layer.up.any():
                unknown.append(name)
            continue
        module = spelling.prefix + (name.replace(".", "_") if spelling.underscores else name)
        up = layer.up if spelling.alpha or layer.scale == 1 else layer.scaled_up().to(layer.up.dtype)
        tensors[f"{module}.{spelling.down}"], tensors[f"{module}.{spelling.up}"] = layer.down, up
        if spelling.alpha:
            tensors[f"{module}.{spelling.alpha}"] = torch.tensor(float(layer.scale * layer.rank))
    if unknown:
        raise KeyMismatch(
            f"{lora.where} changes {shortened(unknown, 3)}, which files of {spelling.name} do not have. Choose another "
            "spelling"
        )
    return tensors


def in_layout(lora: LoRA, checkpoint: CheckpointSpec, own: Mapping[str, Shape]) -> LoRA:
    """Return a LoRA equal to `lora` under the module names of a published layout.

    Args:
        lora: a plain LoRA with the names of the module's layers.
        checkpoint: the layout.
        own: parameter name -> shape of the module.

    Raises:
        ValueError: the layout cannot be derived from the module's shapes.
    """
    file = file_shapes(rules_of(checkpoint), own, layout_of(checkpoint))
    held = {f"{name}.weight": factors_of(layer, name) for name, layer in lora.layers.items()}
    by_change = {id(each.change): each for each in held.values()}
    layers: dict[str, LoRALayer] = {}
    for rule in convert.invert(rules_of(checkpoint), file):
        if held.keys().isdisjoint(rule.sources):
            continue
        sources = tuple(held[key].change if key in held else own[key] for key in rule.sources)
        for index, key in enumerate(rule.targets):
            layer = converted_layer(Matched(rule, index, sources, file[key]), by_change)
            layers[key.removesuffix(".weight")] = _part(layer) if isinstance(rule, convert.Split) else layer
    return LoRA(layers, lora.where)


def _part(layer: LoRALayer) -> LoRALayer:
    """Return the `LoRALayer` of a part of a fused weight, in memory of its own, without the ranks whose column of `up`
    is zero: a part of a block diagonal has them.
    """
    used = layer.up.count_nonzero(dim=0) > 0
    if not used.any():
        used[0] = True
    alpha = None if layer.alpha is None else layer.scale * int(used.sum())
    return LoRALayer(layer.down[used], layer.up[:, used], alpha)
