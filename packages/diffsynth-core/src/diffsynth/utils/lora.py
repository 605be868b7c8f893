"""`diffsynth.utils.lora`: LoRAs as state dicts and files."""

from diffsynth.core.lora.arithmetic import merge_lora, reset_lora_rank
from diffsynth.core.lora.format import read_lora, save_lora
from diffsynth.core.lora.hot import LoRAHotLoadMixin

__all__ = ["LoRAHotLoadMixin", "merge_lora", "read_lora", "reset_lora_rank", "save_lora"]
