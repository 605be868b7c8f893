"""Names of `diffsynth.pipelines.flux_image` in scripts for DiffSynth-Studio."""

from diffsynth.core.loader.config import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_flux.flux1.pipeline import FluxImagePipeline

__all__ = ["ControlNetInput", "FluxImagePipeline", "ModelConfig"]
