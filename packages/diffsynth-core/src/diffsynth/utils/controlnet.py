"""`diffsynth.utils.controlnet`: conditions for ControlNets."""

from diffsynth.core.data.annotator import Annotator
from diffsynth.runtime.controlnet import ControlNetInput

__all__ = ["Annotator", "ControlNetInput"]
