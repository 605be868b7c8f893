"""LoRAs of a network in the spellings of programs, and comparisons of their changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.lora import LoRA, LoRALayer, fit, parse
from diffsynth.core.lora.spelling import spelled, spelling_of
from diffsynth.spec import ArchitectureSpec

ALPHAS = (1.5, 4.0, 0.25)
"""Alphas that layers have in turn, as the files of Lightning have one for each layer."""


def random_lora(
    module: nn.Module, ends: Iterable[str] = ("",), *, rank: int = 3, alphas: Iterable[float | None] = (None,)
) -> LoRA:
    """Return a LoRA of the linear layers whose names have one of these ends; they have the alphas in turn."""
    dice, layers, each = torch.Generator().manual_seed(0), {}, cycle(alphas)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and name.endswith(tuple(ends)):
            outputs, inputs = part.weight.shape
            up = torch.randn(outputs, rank, generator=dice)
            layers[name] = LoRALayer(torch.randn(rank, inputs, generator=dice), up, next(each))
    return LoRA(layers)


def written(lora: LoRA, module: nn.Module, architecture: ArchitectureSpec, spelling: str) -> dict[str, Tensor]:
    """Return the keys of a LoRA in the spelling of a program."""
    own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    return spelled(lora, spelling_of(spelling, architecture), own, _discovery.catalog().layouts()[1])


def fitted(state_dict: Mapping[str, Tensor], module: nn.Module, architecture: ArchitectureSpec) -> LoRA:
    """Return the LoRA of a file under the network's names."""
    return fit(parse(state_dict), module, _discovery.catalog().layouts()[1], architecture=architecture.name)


def change(layer: LoRALayer) -> Tensor:
    """Return the change of a weight, `alpha / rank * B A`."""
    return layer.scaled_up() @ layer.down.float()


def assert_same(found: LoRA, expected: LoRA) -> None:
    """Assert that two LoRAs change the same layers by the same."""
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        torch.testing.assert_close(change(found.layers[name]), change(layer), rtol=1e-4, atol=1e-4)


def assert_added(module: nn.Module, before: Mapping[str, Tensor], lora: LoRA, strength: float) -> None:
    """Assert that every weight is `W + strength * alpha / rank * B A`, and that the others are what they were."""
    for key, weight in module.state_dict().items():
        layer = lora.layers.get(key.removesuffix(".weight"))
        factor = 0.0 if layer is None else strength * (1 if layer.alpha is None else layer.alpha / layer.rank)
        added = 0 if layer is None else factor * layer.up @ layer.down
        torch.testing.assert_close(weight, before[key] + added)
