"""The kernel of norm and rotary embedding against the reference in fp64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import parity
from diffsynth.nn import naive
from diffsynth.nn.triton.norm_rotary import norm_rotary
from fused_kernels import TOLERANCE


def close(x, weight, cos, sin):
    got = norm_rotary(x, weight, cos, sin, 1e-6)
    q, cos, sin = x.double(), cos.double(), sin.double()
    if weight is None:
        truth = naive.apply_rotary(q, cos, sin)
    else:
        truth = naive.rms_norm_rotary(q, weight.double(), cos, sin, eps=1e-6)
    assert got.dtype == x.dtype
    assert parity.relative_error(got, truth) < TOLERANCE[x.dtype]


def angles(b, s, d):
    turned = 10 * torch.rand(b, s, d // 2)
    return turned.cos(), turned.sin()


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 3, 60), (63, 2, 100), (111, 1, 96), (257, 1, 128)])
def test_each_head_all_heads_and_no_norm(tokens: int, heads: int, dim: int) -> None:
    x = 3 * torch.randn(1, tokens, heads, dim)
    for weight in (torch.randn(dim), torch.randn(heads * dim), None):
        close(x, weight, *angles(1, tokens, dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    close(torch.randn(2, 9, 4, 96).to(dtype), torch.randn(96).to(dtype), *angles(2, 9, 96))


def test_a_batch_shares_its_angles_and_inputs_may_have_any_strides() -> None:
    cos, sin = angles(1, 40, 60)
    qkv = torch.randn(2, 33, 3, 4, 60)
    close(qkv[:, :, 1], torch.randn(60), cos[:, 7:], sin[:, 7:])
    close(qkv[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2), torch.randn(120)[::2], cos[:, :33], sin[:, :33])
    close(torch.randn(2, 33, 60, 4).transpose(2, 3), torch.randn(60), cos[:, :33], sin[:, :33])
