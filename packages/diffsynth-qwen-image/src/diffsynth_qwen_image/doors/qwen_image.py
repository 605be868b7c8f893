"""Names of `diffsynth.pipelines.qwen_image` in scripts for DiffSynth-Studio."""

from diffsynth.compat.doors import door, use
from diffsynth.core.loader.config import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_qwen_image.pipeline import QwenImagePipeline

__all__ = ["ControlNetInput", "ModelConfig", "QwenImagePipeline"]
__getattr__ = door(
    __name__,
    absent={
        "FlowMatchScheduler": use("diffsynth.sampling.schedule.qwen_image_sigmas"),
        "model_fn_qwen_image": use("QwenImagePipeline.velocity"),
    },
)
