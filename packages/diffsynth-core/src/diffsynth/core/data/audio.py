"""The class `Audio`: sound, as samples and their rate."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound, as a pipeline returns it. Two objects are equal only if they are the same object.

    Args:
        samples: floating-point tensor `channels samples`, in [-1, 1].
        sample_rate: samples per second of each channel, in Hz.
    """

    samples: Float[Tensor, "channels samples"]
    sample_rate: int
