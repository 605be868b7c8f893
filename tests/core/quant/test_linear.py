"""Quantized layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffsynth.core.quant.linear import QuantizedLinear
from diffsynth.core.quant.methods import method_of


@pytest.fixture(scope="module")
def layers() -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32).eval().requires_grad_(False)
    return layer, QuantizedLinear.of(layer, method_of("fp8_row", {}))


def test_the_output_is_that_of_the_dequantized_weight(layers) -> None:
    layer, quantized = layers
    x = torch.randn(3, 5, 48)
    weight = quantized.method.dequantize(quantized.parts, torch.float32)
    assert torch.equal(quantized(x), nn.functional.linear(x, weight, layer.bias))
    assert torch.equal(quantized(x), quantized.dequantized(torch.float32)(x))
    assert quantized(x.bfloat16()).dtype == torch.bfloat16
    assert isinstance(quantized, nn.Linear)


def test_casts_leave_the_parts_as_they_are(layers) -> None:
    _, quantized = layers
    before = {name: tensor.clone() for name, tensor in quantized.parts.items()}
    x = torch.randn(2, 48)
    expected = quantized(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        quantized.to(dtype)
        assert quantized.bias.dtype == dtype
    assert all(torch.equal(quantized.parts[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=2e-3)  # the bias was rounded to bf16


def test_the_state_dict_makes_the_same_layer(layers) -> None:
    layer, quantized = layers
    shell = QuantizedLinear.shell(layer, quantized.method)
    assert all(parameter.is_meta for parameter in shell.parameters())
    shell.load_state_dict(quantized.state_dict(), assign=True)
    x = torch.randn(2, 48)
    assert torch.equal(shell(x), quantized(x))
    assert set(quantized.state_dict()) == {"weight", "weight_scale", "bias"}


def test_gradients_flow_to_the_input_alone(layers) -> None:
    _, quantized = layers
    x = torch.randn(2, 48, requires_grad=True)
    quantized(x).sum().backward()
    expected = quantized.dequantized(torch.float32).weight.sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad, expected)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
