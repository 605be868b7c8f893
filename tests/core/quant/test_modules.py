"""Quantized modules: in memory, read from files layer by layer, and under the VRAM engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffsynth.core.quant.config import MixedQuantizeConfig, QuantizeConfig
from diffsynth.core.quant.modules import dequantize_module, linear_layers, quantize_module, quantized_layers
from diffsynth.core.vram.managed import wrap
from diffsynth.core.vram.policy import Policy


class Network(nn.Module):
    """Two blocks with a residual, and layers before and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))
        self.norm_out = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.norm_out(x)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval().requires_grad_(False)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def test_layers_are_replaced_in_place_and_back(network) -> None:
    before = network(X)
    names = quantize_module(network, QuantizeConfig("int8_row"), high_precision=("norm*",))
    assert names == [name for name, _ in quantized_layers(network)]
    assert "norm_out" not in names
    assert len(names) == 7
    after = network(X)
    assert 1e-4 < (after - before).norm() / before.norm() < 0.03
    assert dequantize_module(network, torch.float32) == names
    assert torch.equal(network(X), after)
    assert type(network.embed) is nn.Linear


def test_dequantized_once_is_the_same(network) -> None:
    other = copy.deepcopy(network)
    quantize_module(network, QuantizeConfig("fp8_block"))
    quantize_module(other, QuantizeConfig("fp8_block", mode="dequant_once"))
    assert not list(quantized_layers(other))
    assert torch.equal(network(X), other(X))


def test_mixed_methods(network) -> None:
    quantize_module(
        network,
        MixedQuantizeConfig(
            [
                QuantizeConfig("fp8_row", target_modules=["embed"]),
                QuantizeConfig("int8_row", target_modules=["blocks.*"]),
            ]
        ),
    )
    methods = {name: layer.method.name for name, layer in quantized_layers(network)}
    assert methods["embed"] == "fp8_row"
    assert methods["blocks.0.0"] == "int8_row"
    assert "norm_out" not in methods


@pytest.mark.parametrize("preset", ["cpu-offload", "fp8", "dynamic"])
def test_the_vram_engine_moves_the_parts_and_changes_no_bit(network, preset) -> None:
    quantize_module(network, QuantizeConfig("int8_row"))
    size = sum(part.nbytes for _, layer in quantized_layers(network) for part in layer.parts.values())
    expected = network.to(torch.bfloat16)(X.bfloat16())
    managed = wrap(network, Policy.preset(preset, "cpu", torch.bfloat16), smallest=0, high_precision=("*bias",))
    footprint = managed.footprint()
    stored = sum(block.stored for block in footprint.blocks) + footprint.rest_stored
    assert size < stored < 2 * size + 16384
    managed.configure(resident=(), slots=1)
    with managed:
        assert torch.equal(network(X.bfloat16()), expected)
    managed.unwrap()
    assert torch.equal(network(X.bfloat16()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.requires_grad_(True), "is trained: embed.weight, .* require gradients"),
        (lambda net: quantize_module(net, QuantizeConfig("int8_row")), "is quantized already: embed"),
        (lambda net: wrap(net, Policy.preset("cpu-offload", "cpu"), smallest=0), "is wrapped by the VRAM engine"),
        (lambda net: setattr(net.blocks[0][0], "weight", net.blocks[1][0].weight), "shares its weight with blocks.1.0"),
    ],
)
def test_modules_that_cannot_be_quantized_are_refused(network, change, message) -> None:
    change(network)
    before = [type(part) for part in network.modules()]
    with pytest.raises(ValueError, match=message):
        quantize_module(network, QuantizeConfig("int8_row"))
    assert [type(part) for part in network.modules()] == before


def test_layers_whose_weight_is_read_by_others_are_left(network) -> None:
    network.attention = nn.MultiheadAttention(8, 2)
    assert "attention.out_proj" not in dict(linear_layers(network))
    assert [name for name, _ in linear_layers(network, atomic=(nn.Sequential,))] == ["embed", "norm_out"]
