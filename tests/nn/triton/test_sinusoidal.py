"""The kernel of sinusoids against fp64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from diffsynth.nn.triton.sinusoidal import sinusoidal_embedding


@pytest.mark.parametrize("dim", [60, 96, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_more_accurate_than_an_fp32_angle(dim: int, dtype: torch.dtype) -> None:
    time = torch.tensor([0.0, 1.0, 333.25, 999.5, 1000.0]).to(dtype)[::2]
    half = dim // 2
    angles = time.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    got = sinusoidal_embedding(time, dim, 10000.0)
    assert got.dtype == torch.float32
    assert (got - torch.cat((angles.cos(), angles.sin()), dim=-1)).abs().max() < 1e-6
