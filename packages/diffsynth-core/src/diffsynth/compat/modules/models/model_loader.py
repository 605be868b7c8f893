"""Door: the collection of loaded models."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(__name__, absent={"ModelPool": use("diffsynth.load, or from_pretrained of a pipeline class")})
