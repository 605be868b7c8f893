"""From the keys of a file to layers: the spellings in which programs write a LoRA. The module names stay the file's.

A key that is no part of a LoRA is an error that names it: what is left out would be missing in the picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from diffsynth.core.lora.layer import LoRA, LoRALayer
from diffsynth.errors import KeyMismatch, shortened

_MATRIX = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B|down|up)|lora\.(?P<dotted>down|up))(?:\.(?P<adapter>\w+))?\.weight"
)
"""peft and diffusers, with the name of an adapter or without; kohya; diffusers before it used peft."""

_ALPHA = re.compile(r"(?P<module>.+)\.alpha")

_DOWN = ("A", "down")

_OTHER = {
    r".*\.(lora_magnitude_vector|dora_scale)(\..+)?": "DoRA (a LoRA with a magnitude for each output)",
    r".*\.(hada|lokr|oft)_.+": "LoHa, LoKr or OFT (not a product of two matrices)",
    r".*\.lora_mid\..+": "a convolution in three factors",
    r".*\.(diff|diff_b|set_weight)": "a plain difference of a whole parameter",
    r".*\.lora_(A|B|down|up)(\.\w+)?\.bias": "a LoRA with biases",
    r".*\.lora_embedding_(A|B)(\..+)?": "a LoRA of an embedding",
}
"""What else such files hold -> what it is."""


def parse(state_dict: Mapping[str, Tensor], where: str = "the given state_dict") -> LoRA:
    """The layers of a state dict, whichever way it spells them.

    Args:
        state_dict: key -> tensor; every key must be a part of a LoRA.
        where: the file, for messages.

    Raises:
        KeyMismatch: no LoRA at all, keys of another kind of adapter, half of a pair, or a pair of two ranks.
    """
    matrices: dict[tuple[str, str], dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    others: list[str] = []
    for key, tensor in state_dict.items():
        if match := _MATRIX.fullmatch(key):
            side = "down" if (match["side"] or match["dotted"]) in _DOWN else "up"
            pair = matrices.setdefault((match["module"], match["adapter"] or ""), {})
            if side in pair:
                raise KeyMismatch(f"{where} holds {key} and the same matrix under another spelling; expected one")
            pair[side] = tensor
        elif (match := _ALPHA.fullmatch(key)) and tensor.numel() == 1:
            alphas[match["module"]] = float(tensor)
        else:
            others.append(key)
    if others or not matrices:
        _refuse(where, others, count=len(state_dict), is_lora=bool(matrices))
    _check_adapters(where, matrices)
    layers = {module: _layer(where, module, pair, alphas.pop(module, None)) for (module, _), pair in matrices.items()}
    if alphas:
        raise KeyMismatch(f"{where} has an alpha but no matrices for {shortened(alphas, 4)}")
    return LoRA(layers, where)


def _layer(where: str, module: str, pair: Mapping[str, Tensor], alpha: float | None) -> LoRALayer:
    if len(pair) < 2:
        (there,) = pair
        raise KeyMismatch(f"{where} has the {there} matrix of {module} alone; expected down and up (lora_A and lora_B)")
    down, up = pair["down"], pair["up"]
    if down.dim() > 2 and up.dim() == down.dim() and all(size == 1 for size in (*down.shape[2:], *up.shape[2:])):
        down, up = down.flatten(1), up.flatten(1)  # a linear layer that was written as a convolution of one pixel
    if down.dim() != 2 or up.dim() != 2:
        raise KeyMismatch(
            f"{where}: {module} has matrices of shape {tuple(down.shape)} and {tuple(up.shape)}; expected 2 axes each, "
            "those of a linear layer"
        )
    if down.shape[0] != up.shape[1]:
        raise KeyMismatch(
            f"{where}: the down matrix of {module}, {tuple(down.shape)}, has rank {down.shape[0]}, and the up matrix, "
            f"{tuple(up.shape)}, has rank {up.shape[1]}; expected one rank. The file is damaged"
        )
    if down.shape[0] == 0:
        raise KeyMismatch(f"{where}: {module} has rank 0; expected 1 or more")
    return LoRALayer(down, up, alpha)


def _check_adapters(where: str, matrices: Mapping[tuple[str, str], object]) -> None:
    adapters = sorted({adapter for _, adapter in matrices})
    if len(adapters) > 1:
        named = ", ".join(repr(adapter) for adapter in adapters)
        raise KeyMismatch(f"{where} holds several adapters: {named}; expected one. Give the keys of one as state_dict")


def _refuse(where: str, others: list[str], *, count: int, is_lora: bool) -> NoReturn:
    kinds: dict[str, list[str]] = {}
    for key in others:
        kind = next((what for pattern, what in _OTHER.items() if re.fullmatch(pattern, key)), "no part of a LoRA")
        kinds.setdefault(kind, []).append(key)
    told = "; ".join(f"{shortened(keys, 4)}: {kind}" for kind, keys in kinds.items())
    if not is_lora and set(kinds) <= {"no part of a LoRA"}:
        raise KeyMismatch(
            f"{where} holds no LoRA: none of its {count} keys is a lora_A, lora_B, lora_down or lora_up"
            f"{f', such as {others[0]}' if others else ''}. A checkpoint is loaded with model_configs"
        )
    raise KeyMismatch(
        f"{where} has {len(others)} keys that cannot be applied, and nothing of it was: {told}. "
        "Use a plain LoRA, or give the other keys alone as state_dict"
    )
