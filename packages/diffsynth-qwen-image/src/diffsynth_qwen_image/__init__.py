"""Qwen-Image for diffsynth: transformer and pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_qwen_image.pipeline import QwenImagePipeline

__all__ = ["QwenImagePipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffsynth.spec import resolve

        return resolve(f"diffsynth_qwen_image.pipeline:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
