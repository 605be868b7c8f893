"""A step cache as a text: `first_block:threshold=0.1`, for the command line and for records of pictures."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from diffsynth.errors import did_you_mean
from diffsynth.runtime.acceleration.first_block import FirstBlockCache
from diffsynth.runtime.acceleration.step_cache import StepCache
from diffsynth.runtime.acceleration.taylor import TaylorSeer
from diffsynth.runtime.acceleration.tea import TeaCache
from diffsynth.runtime.acceleration.texts import settings_in

STEP_CACHES: dict[str, type[StepCache]] = {"first_block": FirstBlockCache, "taylor": TaylorSeer, "tea": TeaCache}

StepCacheArgument = FirstBlockCache | TaylorSeer | TeaCache | str | None
"""What a call takes as `step_cache`."""


def parse_step_cache(value: Any) -> StepCache | None:
    """The step cache that a text names, `name` or `name:setting=value,setting=value`; others pass as they are.

    Raises:
        ValueError: an unknown name or setting, or a value out of range.
        TypeError: neither a text nor a step cache.
    """
    if value is None or isinstance(value, StepCache):
        return value
    if not isinstance(value, str):
        raise TypeError(
            f"step_cache={value!r}: expected a StepCache, a text such as 'first_block:threshold=0.1', or None"
        )
    name, _, rest = value.partition(":")
    if name not in STEP_CACHES:
        raise ValueError(
            f"step_cache={value!r}: {name!r} is unknown{did_you_mean(name, STEP_CACHES)}; "
            f"expected one of {', '.join(STEP_CACHES)}"
        )
    kind = STEP_CACHES[name]
    settings = settings_in(rest, [each.name for each in fields(kind)], f"step_cache={value!r}")
    missing = [each.name for each in fields(kind) if each.default is MISSING and each.name not in settings]
    if missing:
        raise ValueError(f"step_cache={value!r}: {name} needs {missing[0]}, as in '{name}:{missing[0]}=0.1'")
    return kind(**settings)
