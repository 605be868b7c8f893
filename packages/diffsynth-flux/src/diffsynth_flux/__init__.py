"""FLUX.1 and FLUX.2 for diffsynth: networks, text encoders and pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_flux.flux1.pipeline import FluxImagePipeline
    from diffsynth_flux.flux2.pipeline import Flux2ImagePipeline

__all__ = ["Flux2ImagePipeline", "FluxImagePipeline"]

_MODULES = {
    "Flux2ImagePipeline": "diffsynth_flux.flux2.pipeline",
    "FluxImagePipeline": "diffsynth_flux.flux1.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from diffsynth.spec import resolve

        return resolve(f"{_MODULES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
