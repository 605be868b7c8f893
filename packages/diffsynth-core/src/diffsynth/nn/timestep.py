"""Embedding of the diffusion time: sinusoids (Vaswani et al. 2017, arXiv:1706.03762), then a small MLP."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.nn import fused, naive


def sinusoidal_embedding(time: Float[Tensor, "b"], dim: int, *, max_period: float = 10000.0) -> Float[Tensor, "b dim"]:
    """Return an fp32 tensor `b dim`: the cosines, then the sines, of `time` (`b`) at `dim / 2` frequencies from 1 down
    to about 1 / max_period.

    Args:
        time: diffusion time in the unit of the network (0 to 1000 for most).
        dim: size of the embedding, even.
        max_period: the longest period, divided by 2 pi.
    """
    out = fused.sinusoidal_embedding(time, dim, max_period=max_period)
    return naive.sinusoidal_embedding(time, dim, max_period=max_period) if out is None else out


class TimestepEmbedder(nn.Module):
    """Embedding of the diffusion time: sinusoids, then `Linear, SiLU, Linear`."""

    def __init__(self, dim: int, *, hidden_dim: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, dim))

    def forward(self, time: Float[Tensor, "b"], *, dtype: torch.dtype) -> Float[Tensor, "b dim"]:
        """Return the embedding of `time` as a tensor `b dim` in `dtype`: fp32 sinusoids, cast, then an MLP."""
        return self.mlp(sinusoidal_embedding(time, self.frequency_dim).to(dtype))
