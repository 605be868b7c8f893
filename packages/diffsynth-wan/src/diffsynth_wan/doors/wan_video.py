"""Names of `diffsynth.pipelines.wan_video` in scripts for DiffSynth-Studio."""

from diffsynth.core.loader.config import ModelConfig
from diffsynth_wan.pipeline import WanVideoPipeline

__all__ = ["ModelConfig", "WanVideoPipeline"]
