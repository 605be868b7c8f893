"""Fused LoRAs: added to a module's weights, without cost when the module runs, and not removable."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.core.lora.applied import Applied, remember, require_new
from diffsynth.core.lora.format import LoRA
from diffsynth.core.lora.hot import not_hot
from diffsynth.core.vram.managed import managed


@torch.no_grad()
def fuse(module: nn.Module, lora: LoRA, alpha: float = 1.0) -> None:
    """Add `lora` to the parameters of `module` in place: `W + alpha * D` in fp32, rounded once to the dtype of W, where
    `D` is `scale * up @ down` for a linear layer and the change's `difference` for others.

    Because of the rounding a LoRA cannot be subtracted again: load the weights anew to remove it. A DoRA is computed
    from the weights as they are, with the LoRAs that were fused before.

    Args:
        module: the module that `fit` fitted the LoRA to. If it is wrapped by the VRAM engine, its weights must be in
            host memory.
        lora: a LoRA with the names of the module's layers.
        alpha: factor of the change. A DoRA is interpolated: 0 is the model, 1 the trained weights.

    Raises:
        ValueError: the weights are on disk, have 8 bits or a tensor subclass, or the module has this LoRA already.
    """
    mark = check_fused(module, lora)
    tensors = _parameters(module)
    for name, layer in lora.layers.items():
        layer_weight: Any = module.get_submodule(name).weight
        weight: Tensor = layer_weight.data
        change = layer.scaled_up(alpha).to(weight.device) @ layer.down.to(weight.device, torch.float32)
        weight.copy_(weight.float() + change)
    for key, other in lora.others.items():
        weight = tensors[key].data
        exact = weight.float()
        weight.copy_(exact + alpha * other.difference(exact))
    remember(module, mark, Applied(alpha, hot=False))


def check_fused(module: nn.Module, lora: LoRA) -> Hashable:
    """Return the fingerprint of `lora`; raise ValueError if it cannot be fused. A running stage of the module ends.

    Raises:
        ValueError: as for `fuse`.
    """
    engine = managed(module)
    if engine is not None:
        engine.leave()
    tensors, remedy = _parameters(module), _remedy(lora)
    for name in lora.layers:
        _check(name, module.get_submodule(name).weight, remedy)
    for key in lora.others:
        _check(key, tensors[key], remedy)
    return require_new(module, lora)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def _remedy(lora: LoRA) -> str:
    if reason := not_hot(lora):
        return (
            f"{reason}, so it must be fused: load the model in 16 bits or more, without a policy or with 'cpu-offload'"
        )
    return "Use hotload=True, which adds the LoRA when the layer runs"


def _check(name: str, weight: Any, remedy: str) -> None:
    if weight.is_meta:
        raise ValueError(f"{name} is stored on disk, so a LoRA cannot be added to its weight. {remedy}")
    if type(weight.data) is not Tensor:
        raise ValueError(f"{name} holds a {type(weight.data).__name__}; expected a plain weight. {remedy}")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"{name} is stored as {weight.dtype}, too coarse to add a LoRA to. {remedy}")
