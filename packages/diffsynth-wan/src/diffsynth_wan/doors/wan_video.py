"""`diffsynth.pipelines.wan_video`, under the names that DiffSynth-Studio's documentation teaches."""

from diffsynth.core.loader.config import ModelConfig
from diffsynth_wan.pipeline import WanVideoPipeline

__all__ = ["ModelConfig", "WanVideoPipeline"]
