"""Exponential moving average of the weights, which samples better than the last step's (arXiv:2312.02696)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of parameters, a second fp32 copy on their device.

    Args:
        parameters: (name, parameter) pairs of the trained parameters.
        decay: decay per step, in (0, 1); in step i it is at most `(1 + i) / (10 + i)`, so the average starts fast.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._live = dict(parameters)
        self._decay = decay
        self._mean = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averaged weights, in place, towards the current weights, by the fraction `1 - min(decay, (1 + step)
        / (10 + step))` of the difference; `step` counts from 0.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        live = [parameter.detach() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self._mean.values()), live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the trained parameters hold the averaged weights; afterwards they have their own
        again.
        """
        with torch.no_grad():
            own = {name: parameter.detach().clone() for name, parameter in self._live.items()}
            self._copy(self._mean)
            try:
                yield
            finally:
                self._copy(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a dict parameter name (`"role.name"`) -> averaged weight, an fp32 tensor that is not copied."""
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy averaged weights from `state`, a dict as `state_dict()` returns it, into this average."""
        for name, mean in self._mean.items():
            mean.copy_(state[name])

    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(source[name])
