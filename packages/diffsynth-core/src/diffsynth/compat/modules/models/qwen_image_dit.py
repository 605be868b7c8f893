"""Door: the diffusion transformer of Qwen-Image."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(__name__, absent=dict.fromkeys(("QwenImageDiT", "RMSNorm"), later("the Qwen-Image family")))
