"""LoRA: reading files in all usual key names, fitting them to a module's names, fusing them or adding them hot.

lora = fit(read_lora("style.safetensors"), module)
fuse(module, lora, alpha=0.8)         # adds it to the weights
add_hot(module, lora, alpha=0.8)      # adds it to the layers' outputs, until clear_hot(module)
"""

from __future__ import annotations

from diffsynth.core.lora.arithmetic import merge_lora, reset_lora_rank
from diffsynth.core.lora.changes import LoRALayer, ParameterChange
from diffsynth.core.lora.fitting import fit, target_layers
from diffsynth.core.lora.format import LoRA, parse, read_lora, save_lora
from diffsynth.core.lora.fused import fuse
from diffsynth.core.lora.hot import LoRAHotLoadMixin, add_hot, clear_hot, is_hot

__all__ = [
    "LoRA",
    "LoRAHotLoadMixin",
    "LoRALayer",
    "ParameterChange",
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
