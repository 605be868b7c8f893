"""Several LoRAs as one, and one LoRA at another rank. Both take and give state dicts, as users' scripts do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffsynth.core.lora.layer import LoRA, LoRALayer
from diffsynth.core.lora.spelling import parse
from diffsynth.errors import KeyMismatch


def merge_lora(loras: Sequence[Mapping[str, Tensor]], alpha: float = 1.0) -> dict[str, Tensor]:
    """One LoRA that does what all of them do together: their ranks are concatenated, so nothing is approximated.

    Args:
        loras: state dicts in any spelling, whose module names are spelled alike; they may change different layers.
        alpha: strength of all of them.

    Returns:
        `lora_A` and `lora_B` for each layer, in the dtypes of the first LoRA that changes it, strength within.

    Raises:
        ValueError: there are none.
        KeyMismatch: one is not a plain LoRA, or two change a layer of different size.
    """
    if not loras:
        raise ValueError("merge_lora got no LoRA; expected at least one state dict")
    by_name: dict[str, list[LoRALayer]] = {}
    for number, state_dict in enumerate(loras):
        for name, layer in parse(state_dict, f"LoRA {number}").layers.items():
            by_name.setdefault(name, []).append(layer)
    return to_state_dict(LoRA({name: stacked(name, layers, alpha) for name, layers in by_name.items()}))


def reset_lora_rank(lora: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The LoRA of another rank that is nearest to this one, layer by layer (Eckart and Young 1936).

    Args:
        lora: a state dict in any spelling.
        rank: of the result; above the LoRA's own nothing is lost, and zeros fill it up.

    Returns:
        `lora_A` and `lora_B` for each layer, in their dtypes, strength within.

    Raises:
        ValueError: a rank below 1.
        KeyMismatch: not a plain LoRA.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: expected 1 or more")
    return to_state_dict(LoRA({name: _nearest(layer, rank) for name, layer in parse(lora).layers.items()}))


def to_state_dict(lora: LoRA, prefix: str = "") -> dict[str, Tensor]:
    """`lora_A`, `lora_B` and, where it is not the rank, `alpha` of each layer, in peft's and diffusers' spelling."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.up
        if layer.alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def stacked(name: str, layers: Sequence[LoRALayer], alpha: float = 1.0) -> LoRALayer:
    """Several changes of one layer as one; the name is for the message.

    Raises:
        KeyMismatch: they are of different size.
    """
    first = layers[0]
    if any(layer.shape != first.shape for layer in layers):
        sizes = ", ".join(str(layer.shape) for layer in layers)
        raise KeyMismatch(f"{name} is changed as a weight of {sizes}: these LoRAs are of different models")
    down = torch.cat([layer.down.to(first.down) for layer in layers])
    if alpha == 1 and all(layer.scale == 1 for layer in layers):
        return LoRALayer(down, torch.cat([layer.up.to(first.up) for layer in layers], dim=1))
    up = torch.cat([layer.scaled_up(alpha).to(first.up.device) for layer in layers], dim=1)
    return LoRALayer(down, up.to(first.up.dtype))


def _nearest(layer: LoRALayer, rank: int) -> LoRALayer:
    # up @ down = Q_up (R_up R_down^T) Q_down^T: the product is small, however large the layer is.
    q_up, r_up = torch.linalg.qr(layer.scaled_up())
    q_down, r_down = torch.linalg.qr(layer.down.float().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    up = q_up @ (left[:, :kept] * root)
    down = (q_down @ (right[:kept].T * root)).T
    up = torch.nn.functional.pad(up, (0, rank - kept))
    down = torch.nn.functional.pad(down, (0, 0, 0, rank - kept))
    return LoRALayer(down.contiguous().to(layer.down.dtype), up.contiguous().to(layer.up.dtype))
