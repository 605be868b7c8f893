"""TaylorSeer: what blocks would give follows from what they gave, as a Taylor series in the step (arXiv:2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

from diffsynth.runtime.acceleration.step_cache import CacheStrategy, FirstBlockCall, StepCache, Streams, difference
from diffsynth.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(StepCache):
    """Run every `interval`-th step; foretell the others: `change(i + k) = sum_m k^m / m! * d^m change(i) / di^m`.

    Derivatives are differences of the steps that ran. The paper foretells every attention and every feed-forward; here
    it is the change that a whole stack makes, one tensor instead of two per block. The last step runs.

    Args:
        interval: at least 1; 1 foretells nothing.
        order: of the series, 0 to 4; 0 repeats the last change.
        warmup_steps: steps at the beginning that run, at least 1.
    """

    interval: int = 3
    order: int = 1
    warmup_steps: int = 2

    def __post_init__(self) -> None:
        for name, least, most in (("interval", 1, None), ("order", 0, 4), ("warmup_steps", 1, None)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least or (most is not None and value > most):
                upper = "" if most is None else f" and at most {most}"
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}{upper}")

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """See `StepCache`."""
        return _TaylorStrategy(self)


class _TaylorStrategy(CacheStrategy):
    def __init__(self, settings: TaylorSeer) -> None:
        super().__init__()
        self._settings = settings
        self._derivatives: dict[int, list[Streams]] = {}
        self._at: dict[int, int] = {}

    def reuses(self, first_call: FirstBlockCall) -> bool:
        since = first_call.index - self._settings.warmup_steps
        return since >= 0 and not first_call.is_last and (since + 1) % self._settings.interval != 0

    def computed(self, stack: int, index: int, start: Streams, end: Streams) -> None:
        before = self._derivatives.get(stack, [])
        now = [difference(end, start)]
        for known in before[: self._settings.order]:
            steps = index - self._at[stack]
            now.append(tuple(change / steps for change in difference(now[-1], known)))
        self._derivatives[stack], self._at[stack] = now, index

    def predicted(self, stack: int, index: int, start: Streams) -> Streams:
        ahead = index - self._at[stack]
        result = start
        for power, derivative in enumerate(self._derivatives[stack]):
            weight = ahead**power / factorial(power)
            result = tuple(value + weight * term for value, term in zip(result, derivative, strict=True))
        return result
