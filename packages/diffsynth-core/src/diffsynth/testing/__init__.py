"""Tools for testing plugins: the conformance suite and the tiny hub. Each name is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth.testing.hub import tiny_hub
    from diffsynth.testing.suite import CONFORMANCE_VERSION, conformance
    from diffsynth.testing.tiny_inputs import tiny_clip, tiny_image

__all__ = ["CONFORMANCE_VERSION", "conformance", "tiny_clip", "tiny_hub", "tiny_image"]

_MODULE_OF = {
    "CONFORMANCE_VERSION": "diffsynth.testing.suite",
    "conformance": "diffsynth.testing.suite",
    "tiny_clip": "diffsynth.testing.tiny_inputs",
    "tiny_hub": "diffsynth.testing.hub",
    "tiny_image": "diffsynth.testing.tiny_inputs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    globals()[name] = value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value
