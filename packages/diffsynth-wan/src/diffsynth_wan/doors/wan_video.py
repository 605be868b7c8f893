"""Names of `diffsynth.pipelines.wan_video` in scripts for DiffSynth-Studio."""

from diffsynth.compat.doors import door, later
from diffsynth.core.loader.config import ModelConfig
from diffsynth_wan.pipeline import WanVideoPipeline

__all__ = ["ModelConfig", "WanVideoPipeline"]
__getattr__ = door(__name__, absent={"WanVideoUnit_S2V": later("Wan-S2V")})
