"""The conditionings of the Qwen-Image pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.inpainting import INPAINT
from diffsynth_qwen_image.features.context import CONTEXT
from diffsynth_qwen_image.features.edit import EDIT

FEATURES = (CONTEXT, EDIT, INPAINT)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
