"""Z-Image models for diffsynth: its pipelines, its network, and the weights of z-image-nano."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_zimage.features.image_to_lora import ZImageImageToLoRAPipeline
    from diffsynth_zimage.pipeline import ZImagePipeline

_MODULES = {"ZImageImageToLoRAPipeline": "features.image_to_lora", "ZImagePipeline": "pipeline"}

__all__ = ["ZImageImageToLoRAPipeline", "ZImagePipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffsynth.spec import resolve

        return resolve(f"diffsynth_zimage.{_MODULES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
