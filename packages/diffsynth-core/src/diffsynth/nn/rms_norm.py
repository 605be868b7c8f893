"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def rms_norm(x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"], *, eps: float) -> Float[Tensor, "*b d"]:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last axis, computed in fp32, in the dtype of `x`."""
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    # Under autocast activations are bf16 and weights fp32: PyTorch's fused kernel takes only equal dtypes.
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight, initially ones."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """See `rms_norm`."""
        return rms_norm(x, self.weight, eps=self.eps)
