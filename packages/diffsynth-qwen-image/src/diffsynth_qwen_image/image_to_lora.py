"""Qwen-Image's image-to-LoRA networks (Qwen-Image-i2L), a class for each kind."""

from __future__ import annotations

from diffsynth.models.image_to_lora import ImageToLoRA


class StyleToLoRA(ImageToLoRA):
    """Network that makes a LoRA of the style of an image."""


class CoarseToLoRA(ImageToLoRA):
    """Network that makes a LoRA of an image, also from the text encoder's hidden states at 224 pixels."""


class FineToLoRA(ImageToLoRA):
    """Network that makes a LoRA of an image, also from the text encoder's hidden states at 1024 pixels."""
