"""Names of `diffsynth.pipelines.qwen_image` in scripts for DiffSynth-Studio."""

from diffsynth.compat.doors import door, use
from diffsynth.compat.image_to_lora import Image2LoRADecode, Image2LoRAEncode
from diffsynth.core.loader.config import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_qwen_image.features.image_to_lora import QwenImageImageToLoRAPipeline
from diffsynth_qwen_image.pipeline import QwenImagePipeline

__all__ = [
    "ControlNetInput",
    "ModelConfig",
    "QwenImagePipeline",
    "QwenImageUnit_Image2LoRADecode",
    "QwenImageUnit_Image2LoRAEncode",
]
__getattr__ = door(
    __name__,
    absent={
        "FlowMatchScheduler": use("diffsynth.sampling.schedule.qwen_image_sigmas"),
        "model_fn_qwen_image": use("QwenImagePipeline.velocity"),
    },
)

QwenImageUnit_Image2LoRAEncode = Image2LoRAEncode


class QwenImageUnit_Image2LoRADecode(Image2LoRADecode):  # noqa: N801
    """Makes LoRAs for Qwen-Image."""

    pipeline = QwenImageImageToLoRAPipeline
