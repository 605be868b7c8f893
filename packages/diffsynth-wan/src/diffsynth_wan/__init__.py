"""Wan video models for diffsynth: `WanVideoPipeline` and its networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_wan.pipeline import WanVideoPipeline

__all__ = ["WanVideoPipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffsynth.spec import resolve

        return resolve(f"diffsynth_wan.pipeline:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
