"""Door: the diffusion transformer of Qwen-Image."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        "QwenImageDiT": use("the class QwenImageDiT of the package for Qwen-Image, or diffsynth.load"),
        "RMSNorm": use("diffsynth.nn.RMSNorm"),
    },
)
