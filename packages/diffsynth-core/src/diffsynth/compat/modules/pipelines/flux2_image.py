"""Door: FLUX.2. A family that declares this door takes its place."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(
    __name__,
    {"ModelConfig": "diffsynth:ModelConfig"},
    dict.fromkeys(("Flux2ImagePipeline", "model_fn_flux2"), later("the FLUX.2 family")),
)
