"""LoRAs of the style of images: as an argument of a call, and as a pipeline that returns the LoRA."""

from __future__ import annotations

from diffsynth.runtime.image_to_lora import STYLE, ImageToLoRAPipeline, image_to_lora_feature, image_to_lora_roles

NETWORKS = {STYLE: "z_image_image_to_lora"}
"""Role -> architecture of the network."""

IMAGE_TO_LORA = image_to_lora_feature(NETWORKS)


class ZImageImageToLoRAPipeline(ImageToLoRAPipeline):
    """Makes a LoRA for Z-Image from images of a style (Z-Image-i2L)."""

    roles = image_to_lora_roles(NETWORKS, optional=False)
