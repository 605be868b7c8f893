"""Diffusion model engine: plugin contracts, discovery, loading, sampling and pipelines.

Every public name is imported on first use: `import diffsynth` alone imports neither torch nor numpy nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth import errors, registry, spec
    from diffsynth.core.loader.config import ModelConfig
    from diffsynth.hookspecs import hookimpl
    from diffsynth.runtime.feature import Condition, Feature
    from diffsynth.runtime.load import load
    from diffsynth.runtime.pipeline import Pipeline
    from diffsynth.runtime.role import Processor, Role, Tokenizer
    from diffsynth.runtime.unit import Phase, unit

    __version__: str

__all__ = [
    "Condition",
    "Feature",
    "ModelConfig",
    "Phase",
    "Pipeline",
    "Processor",
    "Role",
    "Tokenizer",
    "__version__",
    "errors",
    "hookimpl",
    "load",
    "registry",
    "spec",
    "unit",
]

_MODULE_OF = {
    "Condition": "diffsynth.runtime.feature",
    "Feature": "diffsynth.runtime.feature",
    "ModelConfig": "diffsynth.core.loader.config",
    "Phase": "diffsynth.runtime.unit",
    "Pipeline": "diffsynth.runtime.pipeline",
    "Processor": "diffsynth.runtime.role",
    "Role": "diffsynth.runtime.role",
    "Tokenizer": "diffsynth.runtime.role",
    "hookimpl": "diffsynth.hookspecs",
    "load": "diffsynth.runtime.load",
    "unit": "diffsynth.runtime.unit",
}

_OLDER = ("hash_state_dict_keys", "load_model", "load_state_dict")
"""Names of `diffsynth.core` that scripts for DiffSynth-Studio import from here."""


def __getattr__(name: str) -> Any:
    import importlib

    value: Any
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name == "__version__":
        import importlib.metadata

        value = importlib.metadata.version("diffsynth-core")
    elif name in _OLDER:
        value = getattr(importlib.import_module("diffsynth.core"), name)
    elif name in __all__:
        value = importlib.import_module(f"diffsynth.{name}")
    else:
        raise AttributeError(f"module 'diffsynth' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
