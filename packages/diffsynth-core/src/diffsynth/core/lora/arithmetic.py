"""Merging several LoRAs into one, and changing a LoRA's rank. All take and return state dicts, as scripts do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffsynth.core.lora.changes import LoRALayer
from diffsynth.core.lora.format import LoRA, parse, require_plain, to_state_dict
from diffsynth.errors import KeyMismatch


def merge_lora(loras: Sequence[Mapping[str, Tensor]], alpha: float = 1.0) -> dict[str, Tensor]:
    """Return a state dict (key -> tensor) of one LoRA: the sum of all `loras`, times the one number `alpha`; its rank
    is the sum of theirs, layer by layer.

    Args:
        loras: state dicts in any known key names, with the same module names; they may change different layers.
        alpha: factor of the sum.

    Returns:
        `lora_A` and `lora_B` of each layer, in the dtypes of the first LoRA that changes it, with all factors in
        `lora_B`.

    Raises:
        ValueError: `loras` is empty.
        KeyMismatch: one is not a plain LoRA, or two change a layer of different size.
    """
    if not loras:
        raise ValueError("merge_lora got no LoRA; expected at least one state dict")
    by_name: dict[str, list[LoRALayer]] = {}
    for number, state_dict in enumerate(loras):
        for name, layer in _plain(state_dict, f"LoRA {number}").items():
            by_name.setdefault(name, []).append(layer)
    return to_state_dict(LoRA({name: stacked(name, layers, alpha) for name, layers in by_name.items()}))


def reset_lora_rank(lora: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return a state dict (key -> tensor) of the LoRA of rank `rank` that is nearest to `lora` in each layer (Eckart
    and Young 1936).

    Args:
        lora: a state dict in any known key names.
        rank: the new rank. Above the LoRA's own rank the matrices are padded with zeros.

    Returns:
        `lora_A` and `lora_B` of each layer, in their dtypes, with all factors in the matrices.

    Raises:
        ValueError: a rank below 1.
        KeyMismatch: not a plain LoRA.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: expected 1 or more")
    return to_state_dict(LoRA({name: _nearest(layer, rank) for name, layer in _plain(lora, "the LoRA").items()}))


def stacked(name: str, layers: Sequence[LoRALayer], alpha: float = 1.0) -> LoRALayer:
    """Return one `LoRALayer`: the sum of all `layers`, times the one number `alpha`; its rank is the sum of their
    ranks.

    Args:
        name: the layer's name, for the message.
        layers: the changes; the result has the dtypes and device of the first.
        alpha: factor of the sum.

    Raises:
        KeyMismatch: the changes are of different size.
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


def _plain(state_dict: Mapping[str, Tensor], where: str) -> Mapping[str, LoRALayer]:
    lora = parse(state_dict, where)
    require_plain(lora)
    return lora.layers


def _nearest(layer: LoRALayer, rank: int) -> LoRALayer:
    # up @ down = Q_up (R_up R_down^T) Q_down^T: only the small inner product needs an SVD, whatever the layer's size.
    q_up, r_up = torch.linalg.qr(layer.scaled_up())
    q_down, r_down = torch.linalg.qr(layer.down.float().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    count = min(rank, len(values))
    root = values[:count].sqrt()
    up = q_up @ (left[:, :count] * root)
    down = (q_down @ (right[:count].T * root)).T
    up = torch.nn.functional.pad(up, (0, rank - count))
    down = torch.nn.functional.pad(down, (0, 0, 0, rank - count))
    return LoRALayer(down.contiguous().to(layer.down.dtype), up.contiguous().to(layer.up.dtype))
