"""Tiny LoRAs and ControlNets of Qwen-Image under the file names of the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from diffsynth.core.lora import LoRA, LoRALayer, save_lora, target_layers
from diffsynth_qwen_image.checkpoints import LORA_TARGETS
from diffsynth_qwen_image.config import TINY_DIT
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.models import TINY


def write_lora(root: Path, source: str, seed: int) -> None:
    """Write a LoRA with an alpha for each layer, as those of Lightning have."""
    with torch.device("meta"):
        dit = QwenImageDiT(replace(TINY_DIT, **TINY["dit"]))
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in target_layers(dit, LORA_TARGETS):
        outputs, inputs = dit.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) / 8 for shape in ((2, inputs), (outputs, 2)))
        layers[name] = LoRALayer(down, up, alpha=4.0)
    model, _, file = source.partition(":")
    (root / model).mkdir(parents=True, exist_ok=True)
    save_lora(LoRA(layers), root / model / file)
