"""Names of `diffsynth.pipelines.z_image` in scripts for DiffSynth-Studio."""

from diffsynth.compat.image_to_lora import Image2LoRADecode, Image2LoRAEncode
from diffsynth.core.loader.config import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_zimage.features.image_to_lora import ZImageImageToLoRAPipeline
from diffsynth_zimage.pipeline import ZImagePipeline

__all__ = [
    "ControlNetInput",
    "ModelConfig",
    "ZImagePipeline",
    "ZImageUnit_Image2LoRADecode",
    "ZImageUnit_Image2LoRAEncode",
]

ZImageUnit_Image2LoRAEncode = Image2LoRAEncode


class ZImageUnit_Image2LoRADecode(Image2LoRADecode):  # noqa: N801
    """Makes LoRAs for Z-Image."""

    pipeline = ZImageImageToLoRAPipeline
