"""The conditionings of the Z-Image pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.inpainting import INPAINT
from diffsynth_zimage.features.controlnet import CONTROLNET
from diffsynth_zimage.features.edit import EDIT

FEATURES = (CONTROLNET, EDIT, INPAINT)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
