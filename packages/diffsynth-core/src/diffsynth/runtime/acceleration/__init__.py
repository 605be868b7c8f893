"""Making a pipeline's network faster without touching its code: compiled blocks, steps that reuse earlier ones, and
attention that is chosen by step.

The first two work on the repeated blocks that an architecture declares.
"""

from __future__ import annotations

from diffsynth.runtime.acceleration.choice import StepCacheArgument, parse_step_cache
from diffsynth.runtime.acceleration.first_block import FirstBlockCache
from diffsynth.runtime.acceleration.measuring import StepCacheReport, measure_step_cache
from diffsynth.runtime.acceleration.step_attention import AttentionArgument, StepAttention, parse_step_attention
from diffsynth.runtime.acceleration.step_cache import StepCache
from diffsynth.runtime.acceleration.taylor import TaylorSeer
from diffsynth.runtime.acceleration.tea import TeaCache

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
