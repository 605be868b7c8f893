"""Each architecture that says which layers LoRAs change has them, and takes a LoRA beside its weights and in them.

The LoRA goes through a file first, which gives it back to the bit.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.spec import ArchitectureSpec
from diffsynth.testing.checks.architectures import differing, leaves_nothing_on_meta, runs, tiny_output, tiny_real
from diffsynth.testing.checks.check import Check, Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffsynth.core.lora import LoRA

RANK = 2

TOLERANCE = 1e-3
"""Of the change that a LoRA makes: so far may its two ways be apart, in fp32."""


def checks(subject: Subject) -> Iterator[Check]:
    """Two for each architecture with `lora_targets`."""
    for fact in subject.declared("architectures"):
        if not fact.lora_targets:
            continue
        there = f"{fact.name} has the layers that LoRAs change"
        yield Check(there, functools.partial(_has_targets, fact), after=(leaves_nothing_on_meta(fact.name),))
        taken = f"{fact.name} takes a LoRA beside its weights and in them"
        yield Check(taken, functools.partial(_takes_a_lora, fact), after=(there, runs(fact.name)))


def _has_targets(fact: ArchitectureSpec) -> None:
    from diffsynth.core.lora import target_layers

    try:
        target_layers(tiny_real(fact), fact.lora_targets)
    except ValueError as error:
        raise AssertionError(f"lora_targets: {error}") from None


def _takes_a_lora(fact: ArchitectureSpec) -> None:
    from diffsynth.core.lora import add_hot, clear_hot, fuse
    from diffsynth.runtime.memory_options import cuts

    module = tiny_real(fact)
    lora = _through_a_file(_random(module, fact.lora_targets), module)
    plain = tiny_output(fact, module)
    try:
        add_hot(module, lora, atomic=cuts(fact)["atomic"])
    except ValueError as error:
        raise AssertionError(f"lora_targets of layers that no LoRA can stand beside: {error}") from None
    hot = tiny_output(fact, module)
    unmoved = [name for name in plain if name not in differing(plain, hot)]
    assert len(unmoved) < len(plain), "a LoRA of all lora_targets changes no output; are these layers called?"
    clear_hot(module)
    changed = differing(plain, tiny_output(fact, module))
    assert not changed, f"after the LoRA was taken away, the output differs in {', '.join(changed)}"
    fuse(module, lora)
    apart = _apart(plain, hot, tiny_output(fact, module))
    assert not apart, (
        f"a LoRA beside the weights and the same LoRA in them differ, by more than {TOLERANCE} of the change it makes, "
        f"in {', '.join(apart)}: a layer in lora_targets does more than x W^T + b, or its weight is read past it"
    )


def _random(module: nn.Module, targets: tuple[str, ...]) -> LoRA:
    """Changes of a third of each weight's size, so that outputs are moved and not swamped."""
    import torch

    from diffsynth.core.lora import LoRA, LoRALayer, target_layers

    dice, layers = torch.Generator().manual_seed(0), {}
    for name in target_layers(module, targets):
        weight = module.get_submodule(name).weight
        outputs, inputs = weight.shape
        down, up = torch.randn(RANK, inputs, generator=dice), torch.randn(outputs, RANK, generator=dice)
        size = weight.detach().norm() or torch.tensor(1.0)
        layers[name] = LoRALayer(down, up * (size / 3 / (up @ down).norm()), alpha=1.5)
    return LoRA(layers)


def _through_a_file(lora: LoRA, module: nn.Module) -> LoRA:
    import torch

    from diffsynth.core.lora import fit, read_lora, save_lora

    with tempfile.TemporaryDirectory() as folder:
        found = fit(read_lora(save_lora(lora, Path(folder) / "lora.safetensors")), module)
    assert found.layers.keys() == lora.layers.keys(), (
        f"saved for {', '.join(lora.layers)}, read back for {', '.join(found.layers)}"
    )
    for name, layer in lora.layers.items():
        same = found.layers[name]
        whole = torch.equal(same.down, layer.down) and torch.equal(same.up, layer.up) and same.alpha == layer.alpha
        assert whole, f"the LoRA of {name} changed by saving and loading"
    return found


def _apart(plain: Mapping[str, Tensor], hot: Mapping[str, Tensor], cold: Mapping[str, Tensor]) -> list[str]:
    def is_apart(name: str) -> bool:
        moved = (cold[name] - plain[name]).abs().max()
        return bool((hot[name] - cold[name]).abs().max() > TOLERANCE * moved + 1e-6 * plain[name].abs().max())

    return [name for name in plain if plain[name].is_floating_point() and is_apart(name)]
