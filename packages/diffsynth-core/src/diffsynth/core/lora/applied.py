"""Records of the LoRAs that a module has, fused or hot, so that none is added twice; equal values are one LoRA."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsynth.core.lora.format import LoRA

_ATTRIBUTE = "_diffsynth_loras"


@dataclass(frozen=True)
class Applied:
    """A LoRA that a module has.

    Args:
        alpha: its strength.
        hot: whether it is added to the outputs of layers, rather than to the weights.
    """

    alpha: float
    hot: bool


def require_new(module: nn.Module, lora: LoRA) -> Hashable:
    """Return the fingerprint of `lora`, equal for equal LoRAs from different files.

    Raises:
        ValueError: the LoRA is in the module already, fused or hot.
    """
    mark = _fingerprint(lora)
    applied = _loras(module).get(mark)
    if applied is None:
        return mark
    if applied.hot:
        raise ValueError(
            f"{lora.where} is beside these weights already, with alpha={applied.alpha:g}, and would be added twice. "
            "For another alpha call clear_lora() first"
        )
    raise ValueError(
        f"{lora.where} is in these weights already, with alpha={applied.alpha:g}, and would be added twice. Load the "
        "model anew for another alpha, or use hotload=True and clear_lora()"
    )


def remember(module: nn.Module, mark: Hashable, applied: Applied) -> None:
    """Record that `module` has the LoRA of this fingerprint."""
    vars(module)[_ATTRIBUTE] = {**_loras(module), mark: applied}


def forget_hot(module: nn.Module) -> None:
    """Remove the records of hot LoRAs."""
    vars(module)[_ATTRIBUTE] = {mark: applied for mark, applied in _loras(module).items() if not applied.hot}


def is_fused(module: nn.Module) -> bool:
    """Whether a LoRA was fused into (added to) the weights of `module`."""
    return any(not applied.hot for applied in _loras(module).values())


def _loras(module: nn.Module) -> dict[Hashable, Applied]:
    return dict(vars(module).get(_ATTRIBUTE, {}))


def _fingerprint(lora: LoRA) -> Hashable:
    """Return a frozenset of one tuple for each change: its name, its factor, and two sums of each of its tensors."""
    layers = {
        (name, _sums(layer.down)[1], layer.scaled_up().double().sum().item()) for name, layer in lora.layers.items()
    }
    others = {
        (name, each.scale, *(number for tensor in each.tensors.values() for number in _sums(tensor)))
        for name, change in lora.others.items()
        for each in change.factors
    }
    return frozenset(layers | others)


def _sums(tensor: Tensor) -> tuple[float, float]:
    values = tensor if tensor.element_size() > 1 else tensor.float()
    return values.sum(dtype=torch.float64).item(), values.abs().sum(dtype=torch.float64).item()
