"""The conditionings of the Z-Image pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.inpainting import INPAINT
from diffsynth_zimage.features.controlnet import CONTROLNET
from diffsynth_zimage.features.edit import EDIT
from diffsynth_zimage.features.image_to_lora import IMAGE_TO_LORA

FEATURES = (CONTROLNET, EDIT, INPAINT, IMAGE_TO_LORA)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
