"""The step caches that a call can use, `FirstBlockCache`, `TaylorSeer` and `TeaCache`, and their text form."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import Tensor

from diffsynth import _discovery, registry
from diffsynth.core.arguments import check_integer, check_number
from diffsynth.errors import did_you_mean, shown
from diffsynth.runtime.acceleration.settings import parse_settings
from diffsynth.runtime.acceleration.step_cache import (
    CacheStrategy,
    FirstBlockCall,
    StepCache,
    Streams,
    difference,
    relative_change,
)
from diffsynth.spec import ModelSpec, TeaCacheSpec


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(StepCache):
    """Runs the first block of every step, and skips the others if its residual changed by less than `threshold`.

    If the first block changes its stream as before, so do the others (ParaAttention): their last changes are added
    again. The residual is compared with that of the last step that ran whole, so small changes add up.

    Args:
        threshold: relative L1 change, at least 0; 0 skips nothing, 0.05 to 0.15 is usual.
        warmup_steps: steps at the beginning that run whole, at least 1.
        max_reused: maximum number of skipped steps in a row; None is no limit.
    """

    threshold: float
    warmup_steps: int = 1
    max_reused: int | None = None

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0)
        check_integer("warmup_steps", self.warmup_steps, least=1, note="the first step has no past")
        if self.max_reused is not None:
            check_integer("max_reused", self.max_reused, least=1, note="None is no limit")

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """Return a new `CacheStrategy` with these settings; see `StepCache.strategy`."""
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


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(StepCache):
    """Runs every `interval`-th step and extrapolates the others by a Taylor series in the step (arXiv:2503.06923).

    `change(i + k) = sum_m k^m / m! * d^m change(i) / di^m`, where derivatives are differences of the steps that ran.
    The paper extrapolates the output of every attention and every feed-forward; here it is the change that a whole
    stack makes, one tensor instead of two per block. The last step runs.

    Args:
        interval: at least 1; 1 extrapolates nothing.
        order: of the series, 0 to 4; 0 repeats the last change.
        warmup_steps: steps at the beginning that run, at least 1.
    """

    interval: int = 3
    order: int = 1
    warmup_steps: int = 2

    def __post_init__(self) -> None:
        for name, least, most in (("interval", 1, None), ("order", 0, 4), ("warmup_steps", 1, None)):
            check_integer(name, getattr(self, name), least=least, most=most)

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """Return a new `CacheStrategy` with these settings; see `StepCache.strategy`."""
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
            weight = ahead**power / math.factorial(power)
            result = tuple(value + weight * term for value, term in zip(result, derivative, strict=True))
        return result


@dataclass(frozen=True, kw_only=True)
class TeaCache(StepCache):
    """Skips steps until a polynomial of the changes of the time signal adds up to `threshold` (arXiv:2411.19108).

    The coefficients are fitted to a model and published with it, as `ModelSpec.tea_cache`. The first and the last step
    run.

    Args:
        threshold: at least 0; 0 skips nothing, 0.05 to 0.3 is usual.
        model: name of the model whose coefficients are used; empty is the pipeline's own model. A pipeline of files or
            components has no model name.
        fitted: other coefficients, in place of a model's.
    """

    threshold: float
    model: str = ""
    fitted: TeaCacheSpec | None = None

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0)
        if not isinstance(self.model, str):
            raise TypeError(f"model={shown(self.model)}: expected a model's name, or '' for the pipeline's own")
        if not isinstance(self.fitted, TeaCacheSpec | None):
            raise TypeError(f"fitted={shown(self.fitted)}: expected a TeaCacheSpec, or None")

    def refuses(self, model: ModelSpec | None) -> str | None:
        """Return the reason why this step cache cannot serve a model, as text, or None if it can; see `StepCache`."""
        if self.fitted is not None:
            return None
        named = model_named(self.model) if self.model else model
        if named is None:
            return "this pipeline has no model's name; say whose coefficients to use, TeaCache(model=...)"
        if named.tea_cache is None:
            return f"nobody has published coefficients for {named.name!r}; FirstBlockCache and TaylorSeer need none"
        return None

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """Return a new `CacheStrategy` with these settings and the coefficients; see `StepCache.strategy`."""
        named = model_named(self.model) if self.model else model
        fitted = self.fitted or (named.tea_cache if named is not None else None)
        assert fitted is not None, "refuses() comes first"
        return _TeaStrategy(self.threshold, fitted)


class _TeaStrategy(CacheStrategy):
    def __init__(self, threshold: float, fitted: TeaCacheSpec) -> None:
        super().__init__()
        self._threshold = threshold
        self._fitted = fitted
        self._last: Tensor | None = None
        self._distance = 0.0

    def reuses(self, first_call: FirstBlockCall) -> bool:
        signal, last = self._signal(first_call), self._last
        self._last = signal
        if last is None or first_call.is_last or self._threshold == 0:
            self._distance = 0.0
            return False
        self._distance += self._polynomial(relative_change((signal,), (last,)))
        if self._distance < self._threshold:
            return True
        self._distance = 0.0
        return False

    def _signal(self, first_call: FirstBlockCall) -> Tensor:
        kind, _, name = self._fitted.signal.partition(":")
        return first_call.output_of(name) if kind == "module" else first_call.arguments[name]

    def _polynomial(self, x: float) -> float:
        value = 0.0
        for coefficient in self._fitted.coefficients:
            value = value * x + coefficient
        return value


def model_named(name: str) -> ModelSpec:
    """Return the `ModelSpec` that declares a model.

    Raises:
        UnknownModel, AmbiguousModel: see `diffsynth.registry.get`.
    """
    record = registry.get(name)
    declared = _discovery.catalog().models
    return next(one.spec for one in declared if (one.plugin, one.spec.name) == (record.plugin, record.name))


STEP_CACHES: dict[str, type[StepCache]] = {"first_block": FirstBlockCache, "taylor": TaylorSeer, "tea": TeaCache}

StepCacheArgument = FirstBlockCache | TaylorSeer | TeaCache | str | None
"""The type of a call's argument `step_cache`."""


def parse_step_cache(value: Any) -> StepCache | None:
    """Return `value` as a `StepCache`: a text such as "first_block:threshold=0.1" is parsed; None stays None.

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
    settings = parse_settings(rest, [each.name for each in fields(kind)], argument=f"step_cache={value!r}")
    missing = [each.name for each in fields(kind) if each.default is MISSING and each.name not in settings]
    if missing:
        raise ValueError(f"step_cache={value!r}: {name} needs {missing[0]}, as in '{name}:{missing[0]}=0.1'")
    return kind(**settings)
