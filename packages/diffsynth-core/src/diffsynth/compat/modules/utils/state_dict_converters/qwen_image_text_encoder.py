"""Door: the converter of Qwen-Image's text encoder."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        "QwenImageTextEncoderStateDictConverter": use(
            "the rules that a layout declares with register_checkpoints: files are converted when they are loaded"
        )
    },
)
