"""The running mean of the weights, which samples better than the last step's (Karras et al. 2024, arXiv:2312.02696)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """A second copy of the parameters that learn, fp32, on their device.

    Args:
        parameters: by name.
        decay: share of the mean that a step keeps; it rises to this as `(1 + step) / (10 + step)`.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._live = dict(parameters)
        self._decay = decay
        self._mean = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, 0 being the first."""
        decay = min(self._decay, (1 + step) / (10 + step))
        live = [parameter.detach() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self._mean.values()), live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The modules hold the mean for the length of the block."""
        with torch.no_grad():
            kept = {name: parameter.detach().clone() for name, parameter in self._live.items()}
            self._copy(self._mean)
            try:
                yield
            finally:
                self._copy(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The mean, by name."""
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved mean."""
        for name, mean in self._mean.items():
            mean.copy_(state[name])

    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(source[name])
