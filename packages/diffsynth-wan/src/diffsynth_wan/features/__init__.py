"""The conditionings of the Wan pipeline, a module each."""

from __future__ import annotations

from diffsynth_wan.features.animate import ANIMATE
from diffsynth_wan.features.animate2 import ANIMATE2
from diffsynth_wan.features.camera import CAMERA
from diffsynth_wan.features.control import CONTROL
from diffsynth_wan.features.image import IMAGE
from diffsynth_wan.features.speed import SPEED
from diffsynth_wan.features.vace import VACE
from diffsynth_wan.features.video import VIDEO

FEATURES = (VIDEO, ANIMATE, ANIMATE2, IMAGE, CONTROL, CAMERA, SPEED, VACE)
"""In the order in which their units run within a phase, and in which their extensions change the stream.

Animate and Animate-2 come before the image, whose unit takes over their latents.
"""
