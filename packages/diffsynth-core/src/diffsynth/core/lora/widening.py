"""Linear layers with more inputs, for LoRAs that add some, such as those for a control image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from diffsynth.core.loader.convert import Shape
from diffsynth.core.lora.format import LoRA


def wider_layers(lora: LoRA) -> dict[str, int]:
    """Return a dict layer name -> number of inputs, for the layers that a fitted LoRA gives more inputs."""
    return {key.removesuffix(".weight"): change.inputs for key, change in lora.others.items() if change.inputs}


@torch.no_grad()
def widen(module: nn.Module, lora: LoRA, infer_config: Callable[[Mapping[str, Shape]], Any]) -> None:
    """Give the layers of `module` the inputs that a fitted LoRA changes, with weights of zero, and `module.config` the
    sizes that follow; without such layers nothing is changed.

    Args:
        module: the module, not wrapped by the VRAM engine.
        lora: a LoRA with the names of the module's parameters.
        infer_config: the function of the module's `ArchitectureSpec`.

    Raises:
        ValueError: the architecture has no network of the new sizes; the message says why.
    """
    wider = wider_layers(lora)
    if not wider:
        return
    before = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    after = before | {f"{name}.weight": (before[f"{name}.weight"][0], inputs) for name, inputs in wider.items()}
    old, new = infer_config(before), infer_config(after)
    for name, inputs in wider.items():
        layer: Any = module.get_submodule(name)
        padded = nn.functional.pad(layer.weight.data, (0, inputs - layer.in_features))
        layer.weight = nn.Parameter(padded, requires_grad=layer.weight.requires_grad)
        layer.in_features = inputs
    changed = {each.name: getattr(new, each.name) for each in fields(new)}
    changed = {name: value for name, value in changed.items() if value != getattr(old, name)}
    config: Any = module.config
    module.config = replace(config, **changed)
