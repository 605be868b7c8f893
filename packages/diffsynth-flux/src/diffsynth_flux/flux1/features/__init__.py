"""The conditionings of the FLUX.1 pipeline, a module each."""

from __future__ import annotations

from diffsynth_flux.flux1.features.control import CONTROL
from diffsynth_flux.flux1.features.controlnet import CONTROLNET
from diffsynth_flux.flux1.features.fill import FILL
from diffsynth_flux.flux1.features.kontext import KONTEXT

FEATURES = (KONTEXT, FILL, CONTROL, CONTROLNET)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
