"""From files to modules: find, read the header, recognise, plan, load. What `diffsynth.core` has of it is here, too."""

from __future__ import annotations

from typing import Any

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffsynth import core

    return getattr(core, name)
