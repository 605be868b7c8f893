"""Door: the text encoder of Qwen-Image."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(__name__, absent={"QwenImageTextEncoder": use("diffsynth.models.qwen25_vl.Qwen25VLTextEncoder")})
