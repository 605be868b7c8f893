"""Z-Image's image-to-LoRA network."""

from __future__ import annotations

from diffsynth.models.image_to_lora import ImageToLoRA


class ZImageImageToLoRA(ImageToLoRA):
    """Network that makes a LoRA for Z-Image's transformer (Z-Image-i2L)."""
