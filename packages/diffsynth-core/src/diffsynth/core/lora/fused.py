"""Fused LoRAs: added to a module's weights, without cost when the module runs, and not removable."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.core.lora.format import LoRA
from diffsynth.core.vram.managed import managed

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_diffsynth_fused_loras"
"""Attribute of a module: fingerprint of each fused LoRA -> its alpha."""


@torch.no_grad()
def fuse(module: nn.Module, lora: LoRA, alpha: float = 1.0) -> None:
    """Add `lora` to the weights of `module` in place: `W + alpha * scale * up @ down` in fp32, rounded once to W's
    dtype.

    Because of the rounding a LoRA cannot be subtracted again: load the weights anew to remove it.

    Args:
        module: the module that `fit` fitted the LoRA to. If it is wrapped by the VRAM engine, its weights must be in
            host memory.
        lora: a LoRA with the names of the module's layers.
        alpha: factor of the change.

    Raises:
        ValueError: the weights are on disk, have 8 bits or a tensor subclass, or this LoRA is fused already.
    """
    engine = managed(module)
    if engine is not None:
        engine.leave()
    weights = {name: module.get_submodule(name).weight for name in lora.layers}
    for name, weight in weights.items():
        _check(name, weight)
    mark = _fingerprint(lora)
    fused: dict[Any, float] = vars(module).setdefault(_ATTRIBUTE, {})
    if mark in fused:
        raise ValueError(
            f"{lora.where} is in these weights already, with alpha={fused[mark]:g}, and would be added twice. Load the "
            "model anew for another alpha, or use hotload=True and clear_lora()"
        )
    for name, layer in lora.layers.items():
        weight = weights[name].data
        change = layer.scaled_up(alpha).to(weight.device) @ layer.down.to(weight.device, torch.float32)
        weight.copy_(weight.float() + change)
    fused[mark] = alpha


def is_fused(module: nn.Module) -> bool:
    """Whether a LoRA was fused into (added to) the weights of `module`."""
    return bool(vars(module).get(_ATTRIBUTE))


def _check(name: str, weight: Any) -> None:
    remedy = "Use hotload=True, which adds the LoRA when the layer runs"
    if weight.is_meta:
        raise ValueError(f"{name} is stored on disk, so a LoRA cannot be added to its weight. {remedy}")
    if type(weight.data) is not Tensor:
        raise ValueError(f"{name} holds a {type(weight.data).__name__}; expected a plain weight. {remedy}")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"{name} is stored as {weight.dtype}, too coarse to add a LoRA to. {remedy}")


def _fingerprint(lora: LoRA) -> frozenset[tuple[str, float, float]]:
    """Return a frozenset of (layer name, sum of absolute values of `down`, sum of scaled `up`) tuples, one for each
    layer; equal for equal LoRAs from different files.
    """
    return frozenset(
        (name, layer.down.double().abs().sum().item(), layer.scaled_up().double().sum().item())
        for name, layer in lora.layers.items()
    )
