"""TeaCache: how far the time has moved the network's input tells how far its output moves (arXiv:2411.19108)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffsynth import _discovery, registry
from diffsynth.runtime.acceleration.step_cache import CacheStrategy, FirstBlockCall, StepCache, relative_change
from diffsynth.spec import ModelSpec, TeaCacheSpec


@dataclass(frozen=True, kw_only=True)
class TeaCache(StepCache):
    """Leave out steps until a polynomial of the signal's relative changes has added up to `threshold`.

    Coefficients are fitted to a model and published with it: `ModelSpec.tea_cache`. The first and the last step run.

    Args:
        threshold: at least 0; 0 reuses nothing, 0.05 to 0.3 is usual.
        model: whose coefficients to use; empty is the pipeline's own. A pipeline put together from files has no name.
        fitted: coefficients of one's own, in place of a model's.
    """

    threshold: float
    model: str = ""
    fitted: TeaCacheSpec | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold={self.threshold!r}: expected a finite number of at least 0")

    def refuses(self, model: ModelSpec | None) -> str | None:
        """See `StepCache`."""
        if self.fitted is not None:
            return None
        named = model_named(self.model) if self.model else model
        if named is None:
            return "this pipeline has no model's name; say whose coefficients to use, TeaCache(model=...)"
        if named.tea_cache is None:
            return f"nobody has published coefficients for {named.name!r}; FirstBlockCache and TaylorSeer need none"
        return None

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """See `StepCache`."""
        named = model_named(self.model) if self.model else model
        fitted = self.fitted or (named.tea_cache if named is not None else None)
        assert fitted is not None, "refuses() comes first"
        return _TeaStrategy(self.threshold, fitted)


def model_named(name: str) -> ModelSpec:
    """What a plugin declared of a model.

    Raises:
        UnknownModel, AmbiguousModel: see `diffsynth.registry.get`.
    """
    record = registry.get(name)
    declared = _discovery.catalog().models
    return next(one.spec for one in declared if (one.plugin, one.spec.name) == (record.plugin, record.name))


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
