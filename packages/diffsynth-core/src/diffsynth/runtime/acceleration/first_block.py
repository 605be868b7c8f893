"""First-block cache: if the first block changes its stream as it did before, so will the rest (ParaAttention)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffsynth.runtime.acceleration.step_cache import (
    CacheStrategy,
    FirstBlockCall,
    StepCache,
    Streams,
    difference,
    relative_change,
)
from diffsynth.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(StepCache):
    """Run the first block of every step; leave out the others when its residual moved by less than `threshold`.

    The residual is compared with that of the last step which ran whole: drift adds up until it counts. What the other
    blocks added then is added again.

    Args:
        threshold: relative L1 change, at least 0; 0 reuses nothing, 0.05 to 0.15 is usual.
        warmup_steps: steps at the beginning that run whole, at least 1.
        max_reused: steps in a row that may be left out; None is no limit.
    """

    threshold: float
    warmup_steps: int = 1
    max_reused: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold={self.threshold!r}: expected a finite number of at least 0")
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps={self.warmup_steps!r}: expected at least 1; the first step has no past")
        if self.max_reused is not None and self.max_reused < 1:
            raise ValueError(f"max_reused={self.max_reused!r}: expected at least 1, or None")

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """See `StepCache`."""
        return _FirstBlockStrategy(self)


class _FirstBlockStrategy(CacheStrategy):
    after_first = True

    def __init__(self, settings: FirstBlockCache) -> None:
        super().__init__()
        self._settings = settings
        self._residual: Streams | None = None
        self._in_a_row = 0

    def reuses(self, first_call: FirstBlockCall) -> bool:
        residual = difference(first_call.output, first_call.streams)
        if self._may_reuse(first_call) and relative_change(residual, self._residual or ()) < self._settings.threshold:
            self._in_a_row += 1
            return True
        self._residual, self._in_a_row = residual, 0
        return False

    def _may_reuse(self, first_call: FirstBlockCall) -> bool:
        limit = self._settings.max_reused
        allowed = limit is None or self._in_a_row < limit
        return self._residual is not None and first_call.index >= self._settings.warmup_steps and allowed
