"""Acceleration of a pipeline's networks without changes of their code.

Three means: compiled blocks, step caches, and attention backends by step. The first two work on the blocks that an
architecture declares in `compiled_blocks` and `cached_blocks`, by default its repeated blocks.
"""

from __future__ import annotations

from diffsynth.runtime.acceleration.measuring import StepCacheReport, measure_step_cache
from diffsynth.runtime.acceleration.step_attention import AttentionArgument, StepAttention, parse_step_attention
from diffsynth.runtime.acceleration.step_cache import StepCache
from diffsynth.runtime.acceleration.strategies import (
    FirstBlockCache,
    StepCacheArgument,
    TaylorSeer,
    TeaCache,
    parse_step_cache,
)

__all__ = [
    "AttentionArgument",
    "FirstBlockCache",
    "StepAttention",
    "StepCache",
    "StepCacheArgument",
    "StepCacheReport",
    "TaylorSeer",
    "TeaCache",
    "measure_step_cache",
    "parse_step_attention",
    "parse_step_cache",
]
