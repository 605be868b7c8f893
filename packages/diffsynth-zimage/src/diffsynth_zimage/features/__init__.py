"""The conditionings of the Z-Image pipeline, a module each."""

from __future__ import annotations

from diffsynth_zimage.features.controlnet import CONTROLNET

FEATURES = (CONTROLNET,)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
