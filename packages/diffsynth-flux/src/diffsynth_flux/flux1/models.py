"""FLUX.1's models, which users load by name. Light: no torch."""

from __future__ import annotations

from diffsynth.spec import ModelSpec

MODELS: tuple[ModelSpec, ...] = ()
