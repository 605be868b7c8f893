"""The kernel of gated activations against the reference in fp64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import parity
from diffsynth.nn import naive
from diffsynth.nn.triton.gated_activation import gated_activation
from fused_kernels import TOLERANCE

REFERENCES = {"silu": naive.swiglu, "gelu": naive.geglu}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def close(gate, up, activation):
    got = gated_activation(gate, up, activation)
    assert got.dtype == gate.dtype
    assert parity.relative_error(got, REFERENCES[activation](gate.double(), up.double())) < TOLERANCE[gate.dtype]


@pytest.mark.parametrize("activation", REFERENCES)
@pytest.mark.parametrize(("rows", "width"), [(1, 60), (63, 96), (111, 100), (257, 128), (3, 2100)])
def test_equals_the_reference(rows: int, width: int, activation: str) -> None:
    close(*(4 * torch.randn(2, 1, rows, width)), activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_of_one_tensor(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 63, 2 * 60).to(dtype).chunk(2, dim=-1)
    close(gate, up, "silu")
    close(gate, up.transpose(0, 1).contiguous().transpose(0, 1), "gelu")


def test_far_from_zero() -> None:
    close(torch.linspace(-60, 60, 63)[None], torch.ones(1, 63), "silu")
    close(torch.linspace(-60, 60, 63)[None], torch.ones(1, 63), "gelu")
