"""Files that training scripts write: a LoRA, or all weights of a network, made from those on the tiny hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.core.loader import convert

RANK = 2
ALPHA = 1.0


def read_weights(folder: Path, pattern: str) -> dict[str, Tensor]:
    """Return the tensors of all files of a repository on the hub that match a pattern."""
    return {key: tensor for file in sorted(folder.glob(pattern)) for key, tensor in load_file(file).items()}


def write_lora(path: Path, weights: dict[str, Tensor], targets: Iterable[str], name: Callable[[str], str]) -> None:
    """Write a LoRA of some layers, which sets no matrix to 0.

    Args:
        path: of the file.
        weights: of the network.
        targets: layers, without ".weight".
        name: layer -> its name in the file, up to the factor: a kohya name if it has no dots, else a name of peft.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in targets:
        outputs, inputs = weights[f"{layer}.weight"].shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, inputs), (outputs, RANK)))
        kohya = "." not in name(layer)
        for key, tensor in zip(
            ("lora_down", "lora_up") if kohya else ("lora_A.default", "lora_B.default"), (down, up), strict=True
        ):
            tensors[f"{name(layer)}.{key}.weight"] = tensor
        if kohya:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def write_full(path: Path, weights: dict[str, Tensor], rules: Sequence[convert.Rename] = ()) -> None:
    """Write weights, under other names.

    Args:
        path: of the file.
        weights: of the network, under its own names.
        rules: from the file's names to those of the network.
    """
    renamed = convert.plan(
        [convert.Rename(rule.target, rule.source) for rule in rules],
        {key: tuple(tensor.shape) for key, tensor in weights.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weights[target.sources[0]].contiguous() for name, target in renamed.targets.items()}, path)
