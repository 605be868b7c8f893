"""The kernel of norms and modulation against the reference in fp64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import parity
from diffsynth.nn import naive
from diffsynth.nn.triton.norm import norm
from fused_kernels import TOLERANCE


def truth(x, weight, bias, scale, shift, residual, gate, kind, eps):
    x, weight, bias, scale, shift, residual, gate = (
        None if tensor is None else tensor.double() for tensor in (x, weight, bias, scale, shift, residual, gate)
    )
    if kind == "rms":
        x = naive.rms_norm(x, weight, eps=eps)
    if kind == "layer":
        x = naive.layer_norm(x, weight, bias, eps=eps)
    x = x if scale is None else naive.modulate(x, scale, shift)
    return x if residual is None else naive.gated_residual(residual, x, gate)


def close(arguments):
    got, x = norm(*arguments), arguments[0]
    assert got.dtype == x.dtype
    assert parity.relative_error(got, truth(*arguments)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("rows", [1, 63, 111, 257])
@pytest.mark.parametrize("width", [60, 96, 100, 128])
def test_rms_norm_with_everything_after_it(rows: int, width: int) -> None:
    x, residual = 3 * torch.randn(2, 2, rows, width)
    weight, scale, gate = torch.randn(width), torch.randn(2, 1, width), torch.randn(1, rows, width)
    close((x, weight, None, scale, torch.randn(1, 1, width), residual, gate, "rms", 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_of_rows_far_from_zero(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 63, 100) + 20).to(dtype)
    weight, bias = torch.randn(2, 100).to(dtype)
    scale, shift = torch.randn(2, 1, 63, 100)  # fp32 beside bf16, as Wan has it
    close((x, weight, bias, scale, shift, None, None, "layer", 1e-6))
    close((x, None, None, None, None, None, None, "layer", 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_norm(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 2, 63, 60).to(dtype)
    scale, shift, gate = torch.randn(3, 2, 1, 60).to(dtype)
    close((x, None, None, scale, None, None, None, "none", 0.0))
    close((x, None, None, scale, shift, None, None, "none", 0.0))
    close((x, None, None, None, None, residual, gate, "none", 0.0))


def test_inputs_may_have_any_strides() -> None:
    wide = torch.randn(2, 3 * 96, 63)
    x, residual, scale = wide.transpose(1, 2).chunk(3, dim=2)  # rows whose elements are not neighbours
    gate = torch.randn(2, 4 * 96)[:, None].chunk(4, dim=2)[1]
    close((x, torch.randn(192)[::2], None, scale[:, :1], None, residual, gate, "rms", 1e-5))
    rows = torch.randn(2, 126, 96)[:, ::2]  # neighbours, but rows are apart
    close((rows, None, None, None, None, residual, gate, "none", 0.0))


def test_eps_counts_where_the_input_is_small() -> None:
    close((torch.full((1, 3, 60), 1e-3), torch.ones(60), None, None, None, None, None, "rms", 1e-6))
    close(
        (
            torch.zeros(1, 3, 60),
            torch.ones(60),
            None,
            None,
            None,
            torch.ones(1, 3, 60),
            torch.ones(1, 1, 60),
            "rms",
            1e-6,
        )
    )
