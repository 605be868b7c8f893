"""For tests of plugins, ours and strangers': what they share, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth.testing.hub import tiny_hub
    from diffsynth.testing.suite import CONFORMANCE_VERSION, conformance

__all__ = ["CONFORMANCE_VERSION", "conformance", "tiny_hub"]

_WHERE = {
    "CONFORMANCE_VERSION": "diffsynth.testing.suite",
    "conformance": "diffsynth.testing.suite",
    "tiny_hub": "diffsynth.testing.hub",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    globals()[name] = value = getattr(importlib.import_module(_WHERE[name]), name)
    return value
