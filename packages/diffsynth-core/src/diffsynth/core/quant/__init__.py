"""Quantized weights of linear layers: configs and methods. Names that come later say so.

`methods` has the methods by name, `method` their interface, `modules` quantizes modules.
"""

from __future__ import annotations

from diffsynth.compat.doors import QUANTIZATION, door, later

_FOUND = {name: f"diffsynth.core.quant.config:{name}" for name in ("MixedQuantizeConfig", "QuantizeConfig")}

__all__ = sorted(_FOUND)
__getattr__ = door(__name__, _FOUND, dict.fromkeys((*QUANTIZATION, "backends"), later("more of quantization")))
