"""The conditionings of the FLUX.1 pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.feature import Feature

FEATURES: tuple[Feature, ...] = ()
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
