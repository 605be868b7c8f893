"""The conditionings of the Qwen-Image pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.inpainting import INPAINT

FEATURES = (INPAINT,)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
