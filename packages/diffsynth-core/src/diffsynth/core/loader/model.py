"""Door: loading a module of one's own class from a file."""

from __future__ import annotations

from diffsynth.compat.doors import door

__getattr__ = door(
    __name__,
    {
        name: f"diffsynth.core:{name}"
        for name in (
            "hash_model_file",
            "load_keys_dict",
            "load_metadata_from_safetensors",
            "load_model",
            "load_model_with_disk_offload",
            "load_state_dict",
            "skip_model_initialization",
        )
    },
)
