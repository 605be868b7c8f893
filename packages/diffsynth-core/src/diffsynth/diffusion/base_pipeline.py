"""Door: the base classes of pipelines."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        "BasePipeline": use("diffsynth.Pipeline, and `velocity()` for the network"),
        "PipelineUnit": use("diffsynth.unit, which makes a unit of a function"),
    },
)
