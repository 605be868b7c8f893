"""`diffsynth.pipelines.z_image`, under the names that DiffSynth-Studio's documentation teaches."""

from diffsynth.core.loader.config import ModelConfig
from diffsynth_zimage.pipeline import ZImagePipeline

__all__ = ["ModelConfig", "ZImagePipeline"]
