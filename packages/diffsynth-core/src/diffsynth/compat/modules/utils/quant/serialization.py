"""Door: saving quantized models."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(__name__, absent={"save_quantized_model": later("more of quantization")})
