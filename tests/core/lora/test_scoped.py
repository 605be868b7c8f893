"""LoRAs of one forward pass: what they add, where, and what they leave behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffsynth.core.lora import LoRA, LoRALayer, add_hot, clear_hot, fit, parse
from diffsynth.core.lora.scoped import check_scoped, scoped


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).requires_grad_(False)


def drawn(seed: int) -> dict[str, LoRALayer]:
    dice = torch.Generator().manual_seed(seed)
    sizes = {"0": (6, 8), "2": (8, 4)}
    return {
        name: LoRALayer(torch.randn(2, inputs, generator=dice), torch.randn(outputs, 2, generator=dice), 4.0)
        for name, (inputs, outputs) in sizes.items()
    }


def test_it_equals_a_changed_weight(module):
    x, layers = torch.randn(3, 6), drawn(1)
    with scoped(module, layers):
        found = module(x)
    for name, change in layers.items():
        module.get_submodule(name).weight += 2.0 * change.up @ change.down
    torch.testing.assert_close(found, module(x))


def test_nothing_stays_behind_also_after_an_error(module):
    x = torch.randn(3, 6)
    plain = module(x)
    with pytest.raises(RuntimeError), scoped(module, drawn(1)):
        module(torch.randn(3, 7))
    assert torch.equal(module(x), plain)
    assert not any(each._forward_hooks for each in module.modules())


def test_several_add_up_beside_a_hot_one(module):
    x, hot = torch.randn(3, 6), LoRA(drawn(3), where="hot")
    with scoped(module, drawn(1)), scoped(module, drawn(2)):
        both = module(x)
    add_hot(module, hot)
    with scoped(module, drawn(1)):
        beside = module(x)
    clear_hot(module)
    for seed in (1, 2):
        add_hot(module, LoRA(drawn(seed), where=str(seed)))
    torch.testing.assert_close(both, module(x))
    clear_hot(module)
    for seed in (3, 1):
        add_hot(module, LoRA(drawn(seed), where=str(seed)))
    torch.testing.assert_close(beside, module(x))


def test_what_cannot_be_added_to_an_output_is_refused(module):
    lora = LoRA(drawn(1), where="x")
    check_scoped(module, lora)
    with pytest.raises(ValueError, match=r"x changes 0\.bias by .* Use load_lora\(\)"):
        check_scoped(module, fit(parse({"0.diff_b": torch.ones(8)}, "x"), module))
    module[2].forward = torch.compile(module[2].forward, backend="eager")
    with pytest.raises(ValueError, match="x is for one call, and the Sequential has compiled parts"):
        check_scoped(module, LoRA({"0": lora.layers["0"]}, where="x"))
