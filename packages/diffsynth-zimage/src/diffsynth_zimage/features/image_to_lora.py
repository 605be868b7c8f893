"""LoRAs of the style of images: as an argument of a call, and as a pipeline that returns the LoRA."""

from __future__ import annotations

from diffsynth.runtime.image_to_lora import ImageToLoRAPipeline, image_to_lora_feature, image_to_lora_roles

ARCHITECTURE = "z_image_image_to_lora"

IMAGE_TO_LORA = image_to_lora_feature(ARCHITECTURE)


class ZImageImageToLoRAPipeline(ImageToLoRAPipeline):
    """Makes a LoRA for Z-Image from images of a style (Z-Image-i2L)."""

    roles = image_to_lora_roles(ARCHITECTURE, optional=False)
