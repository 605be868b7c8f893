"""Names of `diffsynth.pipelines.flux2_image` in scripts for DiffSynth-Studio."""

from diffsynth.compat.doors import door, use
from diffsynth.core.loader.config import ModelConfig
from diffsynth_flux.flux2.pipeline import Flux2ImagePipeline

__all__ = ["Flux2ImagePipeline", "ModelConfig"]
__getattr__ = door(__name__, absent={"model_fn_flux2": use("Flux2ImagePipeline.velocity")})
