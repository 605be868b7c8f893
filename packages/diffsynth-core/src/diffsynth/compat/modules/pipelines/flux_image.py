"""Door: FLUX.1. A family that declares this door takes its place."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(
    __name__,
    {"ControlNetInput": "diffsynth.runtime.controlnet:ControlNetInput", "ModelConfig": "diffsynth:ModelConfig"},
    {"FluxImagePipeline": later("the FLUX.1 family")},
)
