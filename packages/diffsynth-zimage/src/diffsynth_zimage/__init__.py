"""Z-Image models for diffsynth: `ZImagePipeline`, its network, and the weights of z-image-nano."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_zimage.pipeline import ZImagePipeline

__all__ = ["ZImagePipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffsynth.spec import resolve

        return resolve(f"diffsynth_zimage.pipeline:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
