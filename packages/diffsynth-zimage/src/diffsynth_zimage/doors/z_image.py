"""Names of `diffsynth.pipelines.z_image` in scripts for DiffSynth-Studio."""

from diffsynth.core.loader.config import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_zimage.pipeline import ZImagePipeline

__all__ = ["ControlNetInput", "ModelConfig", "ZImagePipeline"]
