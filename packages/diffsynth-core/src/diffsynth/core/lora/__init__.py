"""LoRA: reading every usual spelling, fitting it to a module's own names, adding it to weights or beside them.

lora = fit(read_lora("style.safetensors"), module)
fuse(module, lora, alpha=0.8)         # into the weights, for good
add_hot(module, lora, alpha=0.8)      # beside them, until clear_hot(module)
"""

from __future__ import annotations

from diffsynth.core.lora.arithmetic import merge_lora, reset_lora_rank
from diffsynth.core.lora.cold import fuse
from diffsynth.core.lora.files import read_lora, save_lora
from diffsynth.core.lora.fitting import fit, target_layers
from diffsynth.core.lora.hot import LoRAHotLoadMixin, add_hot, clear_hot, is_hot
from diffsynth.core.lora.layer import LoRA, LoRALayer
from diffsynth.core.lora.spelling import parse

__all__ = [
    "LoRA",
    "LoRAHotLoadMixin",
    "LoRALayer",
    "add_hot",
    "clear_hot",
    "fit",
    "fuse",
    "is_hot",
    "merge_lora",
    "parse",
    "read_lora",
    "reset_lora_rank",
    "save_lora",
    "target_layers",
]
