"""A LoRA that adds inputs to a layer: the layer is widened by zeros, and the config follows."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from diffsynth.core.lora import LoRA, LoRALayer, add_hot, fit, fuse, parse
from diffsynth.core.lora.widening import widen, wider_layers
from diffsynth.errors import KeyMismatch


@dataclass(frozen=True)
class Config:
    """`scale` is no size, and stays."""

    inputs: int = 3
    scale: float = 1.0


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.enter, self.leave = nn.Linear(config.inputs, 4), nn.Linear(4, 3)


def infer(shapes):
    if shapes["enter.weight"][1] > 8:
        raise ValueError("more than 8 inputs")
    return Config(inputs=shapes["enter.weight"][1])


def lora(inputs, **names):
    return LoRA({name: LoRALayer(torch.randn(2, inputs), torch.randn(4, 2), 3.0) for name in names or ("enter",)})


def net():
    return Net(Config(scale=2.0)).requires_grad_(False)


def test_a_wider_layer():
    module, wide = net(), lora(5)
    before = module.enter.weight.clone()
    found = fit(wide, module, widened=["enter"])
    assert wider_layers(found) == {"enter": 5}
    widen(module, found, infer)
    assert module.config == Config(inputs=5, scale=2.0)
    assert torch.equal(module.enter.weight, nn.functional.pad(before, (0, 2)))
    assert module.enter(torch.ones(1, 5)).shape == (1, 4)
    fuse(module, found, 0.5)
    change = 0.5 * wide.layers["enter"].scaled_up() @ wide.layers["enter"].down
    torch.testing.assert_close(module.enter.weight, nn.functional.pad(before, (0, 2)) + change)


def test_fewer_inputs_change_the_first_ones():
    module, narrow = net(), lora(2)
    found = fit(narrow, module, widened=["enter"])
    assert wider_layers(found) == {}
    layer = found.layers["enter"]
    expected = narrow.layers["enter"].up @ narrow.layers["enter"].down
    torch.testing.assert_close(layer.up @ layer.down, nn.functional.pad(expected, (0, 1)))
    widen(module, found, infer)
    assert module.config == Config(scale=2.0)


def test_only_declared_layers_are_widened():
    with pytest.raises(KeyMismatch, match=r"enter.weight is \(4, 3\), the LoRA is for \(4, 5\)"):
        fit(lora(5), net())
    rows = LoRA({"enter": LoRALayer(torch.randn(2, 5), torch.randn(6, 2))})
    with pytest.raises(KeyMismatch, match=r"the LoRA is for \(6, 5\)"):
        fit(rows, net(), widened=["enter"])
    dora = {"enter.lora_A.weight": torch.randn(2, 5), "enter.lora_B.weight": torch.randn(4, 2)}
    with pytest.raises(KeyMismatch, match=r"the LoRA is for \(4, 5\)"):
        fit(parse(dora | {"enter.dora_scale": torch.ones(4, 1)}), net(), widened=["enter"])


def test_it_cannot_be_hot():
    module = net()
    with pytest.raises(ValueError, match="changes enter.weight by LoRA with more inputs, which cannot be computed"):
        add_hot(module, fit(lora(5), module, widened=["enter"]))


def test_a_size_that_no_network_has():
    module = net()
    with pytest.raises(ValueError, match="more than 8 inputs"):
        widen(module, fit(lora(9), module, widened=["enter"]), infer)
    assert module.config == Config(scale=2.0)
    assert module.enter.weight.shape == (4, 3)
