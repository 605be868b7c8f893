"""Checks of `lora_targets`: the layers exist, and a LoRA has the same effect unfused and fused, and in the spelling of
every program.

The LoRA is saved to a file and read back first, which must not change it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.errors import KeyMismatch
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling
from diffsynth.testing.checks.architectures import differing, no_meta_after_loading, runs, tiny_output, tiny_real
from diffsynth.testing.checks.check import Check, Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffsynth.core.lora import LoRA

RANK = 2

TOLERANCE = 1e-3
"""Largest difference between unfused and fused, relative to the change that the LoRA makes, in fp32."""


def checks(subject: Subject) -> Iterator[Check]:
    """Yield three `Check`s (named tests, not yet run) for each architecture of the plugin that has `lora_targets`."""
    for fact in subject.runnable_architectures():
        if not fact.lora_targets:
            continue
        present = f"{fact.name} has the layers in lora_targets"
        yield Check(present, functools.partial(_has_targets, fact), after=(no_meta_after_loading(fact.name),))
        supported, after = functools.partial(_supports_lora, fact), (present, runs(fact.name))
        yield Check(supports_lora(fact.name), supported, after=after, runs_network=True)
        spelled = f"{fact.name} LoRAs are read as they were written, in every spelling"
        yield Check(spelled, functools.partial(_reads_spellings, fact, subject), after=(present,), runs_network=True)


def supports_lora(name: str) -> str:
    """Return the name of the check of LoRAs of architecture `name`: `"{name} output is the same with a LoRA unfused and
    fused"`.
    """
    return f"{name} output is the same with a LoRA unfused and fused"


def _has_targets(fact: ArchitectureSpec) -> None:
    from diffsynth.core.lora import target_layers

    try:
        target_layers(tiny_real(fact), fact.lora_targets)
    except ValueError as error:
        raise AssertionError(f"lora_targets: {error}") from None


def _supports_lora(fact: ArchitectureSpec) -> None:
    from diffsynth.core.lora import add_hot, clear_hot, fuse
    from diffsynth.runtime.architectures import cuts

    module = tiny_real(fact)
    lora = _save_and_read(random_lora(module, fact.lora_targets), module)
    plain = tiny_output(fact, module)
    try:
        add_hot(module, lora, atomic=cuts(fact)["atomic"])
    except ValueError as error:
        raise AssertionError(f"lora_targets has layers that do not support an unfused LoRA: {error}") from None
    hot = tiny_output(fact, module)
    unmoved = [name for name in plain if name not in differing(plain, hot)]
    assert len(unmoved) < len(plain), "a LoRA of all lora_targets changes no output; does forward() call these layers?"
    clear_hot(module)
    changed = differing(plain, tiny_output(fact, module))
    assert not changed, f"after the LoRA was removed, the output differs in {', '.join(changed)}"
    fuse(module, lora)
    apart = _outside_tolerance(plain, hot, tiny_output(fact, module))
    assert not apart, (
        f"a LoRA unfused and fused differ by more than {TOLERANCE} of the change it makes in {', '.join(apart)}: "
        "a layer in lora_targets computes more than x W^T + b, or its weight is read without calling the layer"
    )


def _reads_spellings(fact: ArchitectureSpec, subject: Subject) -> None:
    import torch

    from diffsynth.core.lora import fit, parse
    from diffsynth.core.lora.spelling import SPELLINGS, spelled

    module, checkpoints = tiny_real(fact), subject.catalog.layouts()[1]
    own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    lora = random_lora(module, fact.lora_targets)
    for spelling in {each.name: each for each in (*SPELLINGS, *fact.lora_spellings)}.values():
        written = _representable(lora, spelling, own, checkpoints) if spelling.layers else lora
        try:
            state_dict = spelled(written, spelling, own, checkpoints)
            found = fit(parse(state_dict), module, checkpoints, architecture=fact.name).layers
        except (KeyMismatch, ValueError) as error:
            raise AssertionError(f"lora_spellings: a LoRA written as {spelling.name}: {error}") from error
        assert found.keys() == written.layers.keys(), (
            f"written as {spelling.name} for {', '.join(written.layers)}, read back for {', '.join(found)}"
        )
        for name, layer in written.layers.items():
            change, read = layer.scaled_up() @ layer.down, found[name].scaled_up() @ found[name].down
            assert torch.allclose(change, read, atol=1e-5), f"the LoRA of {name} changed, written as {spelling.name}"


def _representable(
    lora: LoRA, spelling: LoRASpelling, own: Mapping[str, tuple[int, ...]], checkpoints: Sequence[CheckpointSpec]
) -> LoRA:
    """Return the part of `lora` that a spelling which does not know all layers can have."""
    from diffsynth.core.lora import LoRA
    from diffsynth.core.lora.spelling import spelled

    kept = {}
    for name, layer in lora.layers.items():
        try:
            spelled(LoRA({name: layer}), spelling, own, checkpoints)
        except KeyMismatch:
            continue
        kept[name] = layer
    assert kept, f"the spelling {spelling.name} knows no layer of lora_targets"
    return LoRA(kept)


def random_lora(module: nn.Module, targets: tuple[str, ...]) -> LoRA:
    """Return a `LoRA` with random factors that changes the weight of each target layer by a quarter of its norm."""
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


def _save_and_read(lora: LoRA, module: nn.Module) -> LoRA:
    import torch

    from diffsynth.core.lora import fit, read_lora, save_lora

    with tempfile.TemporaryDirectory() as folder:
        found = fit(read_lora(save_lora(lora, Path(folder) / "lora.safetensors")), module)
    assert found.layers.keys() == lora.layers.keys(), (
        f"saved for {', '.join(lora.layers)}, read back for {', '.join(found.layers)}"
    )
    for name, layer in lora.layers.items():
        read = found.layers[name]
        equal = torch.equal(read.down, layer.down) and torch.equal(read.up, layer.up) and read.alpha == layer.alpha
        assert equal, f"the LoRA of {name} changed by saving and loading"
    return found


def _outside_tolerance(
    plain: Mapping[str, Tensor], hot: Mapping[str, Tensor], fused: Mapping[str, Tensor]
) -> list[str]:
    """Return a list of the names of floating-point outputs at which an unfused (`hot`) and a `fused` LoRA differ by
    more than `TOLERANCE` of the change that the LoRA makes to `plain`.
    """

    def differs(name: str) -> bool:
        change = (fused[name] - plain[name]).abs().max()
        return bool((hot[name] - fused[name]).abs().max() > TOLERANCE * change + 1e-6 * plain[name].abs().max())

    return [name for name in plain if plain[name].is_floating_point() and differs(name)]
