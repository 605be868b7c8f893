"""Door: quantization, which comes in a later version."""

from __future__ import annotations

from diffsynth.compat.doors import QUANTIZATION, door, later

__getattr__ = door(__name__, absent=dict.fromkeys((*QUANTIZATION, "backends"), later("quantization")))
