"""Door: ControlNets of Qwen-Image."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        "QwenImageBlockWiseControlNet": use(
            "the class BlockwiseControlNet of the package for Qwen-Image, or a ControlNet's file in model_configs"
        ),
    },
)
