from __future__ import annotations

import pytest
import torch

import parity
from diffsynth.nn.rms_norm import RMSNorm, rms_norm


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_is_the_formula_in_the_dtype_of_its_input(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 63, generator=generator).to(x_dtype) * 30
    weight = torch.randn(63, generator=generator).to(weight_dtype)
    truth = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = rms_norm(x, weight, eps=1e-5)
    assert got.dtype == x_dtype
    assert parity.relative_error(got, truth) < (1e-6 if x_dtype == torch.float32 else 8e-3)


def test_eps_counts_where_the_input_is_small() -> None:
    x = torch.full((1, 4), 1e-3)
    assert torch.allclose(RMSNorm(4, eps=1e-6)(x), torch.full((1, 4), 0.5**0.5))
