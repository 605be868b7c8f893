"""Qwen-Image for diffsynth: transformer and pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_qwen_image.features.image_to_lora import QwenImageImageToLoRAPipeline
    from diffsynth_qwen_image.pipeline import QwenImagePipeline

_MODULES = {"QwenImageImageToLoRAPipeline": "features.image_to_lora", "QwenImagePipeline": "pipeline"}

__all__ = ["QwenImageImageToLoRAPipeline", "QwenImagePipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffsynth.spec import resolve

        return resolve(f"diffsynth_qwen_image.{_MODULES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
