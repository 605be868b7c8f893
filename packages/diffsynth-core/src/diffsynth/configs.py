"""Door: the table of known files of DiffSynth-Studio."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        "MODEL_CONFIGS": use("diffsynth.registry.list() for models, and register_checkpoints of a plugin for layouts")
    },
)
