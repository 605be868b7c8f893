"""Loading files into modules: find, read the header, recognise, plan, load. Also a door to `diffsynth.core`."""

from __future__ import annotations

from diffsynth.compat.doors import door

__all__ = [
    "ModelConfig",
    "hash_model_file",
    "hash_state_dict_keys",
    "load_keys_dict",
    "load_metadata_from_safetensors",
    "load_model",
    "load_state_dict",
    "load_state_dict_from_bin",
    "load_state_dict_from_safetensors",
]
__getattr__ = door(__name__, {name: f"diffsynth.core:{name}" for name in __all__})
