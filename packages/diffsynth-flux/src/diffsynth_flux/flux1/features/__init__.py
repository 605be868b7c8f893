"""The conditionings of the FLUX.1 pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.inpainting import INPAINT
from diffsynth_flux.flux1.features.control import CONTROL
from diffsynth_flux.flux1.features.controlnet import CONTROLNET
from diffsynth_flux.flux1.features.fill import FILL
from diffsynth_flux.flux1.features.ip_adapter import IP_ADAPTER
from diffsynth_flux.flux1.features.kontext import KONTEXT
from diffsynth_flux.flux1.features.redux import REDUX

FEATURES = (KONTEXT, FILL, CONTROL, REDUX, CONTROLNET, IP_ADAPTER, INPAINT)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
