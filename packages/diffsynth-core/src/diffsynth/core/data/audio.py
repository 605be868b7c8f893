"""The class `Audio`: sound, as samples and their rate."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffsynth.core.arguments import check_integer, check_tensors


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound, as a pipeline returns it. Two objects are equal only if they are the same object.

    Args:
        samples: floating-point tensor `channels samples`, in [-1, 1].
        sample_rate: samples per second of each channel, in Hz, at least 1.

    Raises:
        TypeError: `samples` is no floating-point tensor.
        ValueError: it has other than two axes, or the rate is no positive integer.
    """

    samples: Float[Tensor, "channels samples"]
    sample_rate: int

    def __post_init__(self) -> None:
        check_tensors(samples=self.samples)
        if self.samples.ndim != 2:
            raise ValueError(f"samples is {tuple(self.samples.shape)}; expected two axes, (channels, samples)")
        check_integer("sample_rate", self.sample_rate, least=1)
