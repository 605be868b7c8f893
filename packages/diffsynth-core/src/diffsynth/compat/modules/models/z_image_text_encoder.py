"""Door: the text encoder of Z-Image."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(__name__, absent={"ZImageTextEncoder": use("diffsynth.models.qwen3.Qwen3TextEncoder")})
