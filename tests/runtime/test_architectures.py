"""The declared facts of an architecture hold for subclasses of its network, too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffsynth.core.vram.managed import managed
from diffsynth.errors import Unplannable
from diffsynth.runtime.architectures import architecture_of, cached_stacks, compiled_stacks, partition_by
from diffsynth_zimage.dit import ZImageDiT
from limited import let_blocks_travel
from tiny_z_image import SMALL, tiny_z_image
from toy_unet import LISTS, ToyUnet, declare, toy_unet

CALL = {"prompt": "a cat", "num_inference_steps": 2, **SMALL}


class Mine(ZImageDiT):
    """A user's variant of a known network."""


class Renamed(ZImageDiT):
    """A variant that cannot be made from a config alone."""

    def __init__(self, config, name):
        super().__init__(config)
        self.name = name


@pytest.fixture(autouse=True)
def every_block_is_streamed(monkeypatch):
    let_blocks_travel(monkeypatch)


def under_fp8(kind, *arguments):
    pipe = tiny_z_image(n_layers=2)
    dit = kind(pipe.dit.config, *arguments)
    dit.load_state_dict(pipe.dit.state_dict())
    parts = pipe.components | {"dit": dit.requires_grad_(False).eval()}
    parts["text_encoder"].requires_grad_(False)
    return type(pipe)(parts, device="cpu", torch_dtype=torch.float32, policy={"dit": "fp8"})


def test_a_subclass_is_stored_and_streamed_as_its_network_is():
    """The declaration was looked up by the exact class, so a subclass under "fp8" had its norms rounded to float8."""
    known, mine = under_fp8(ZImageDiT), under_fp8(Mine)
    assert managed(mine.dit).footprint("dit") == managed(known.dit).footprint("dit")
    assert torch.equal(mine(**CALL), known(**CALL))


def test_a_call_of_a_wrapped_subclass_is_planned():
    known, mine = under_fp8(ZImageDiT), under_fp8(Mine)
    sizes = {name: CALL[name] for name in ("height", "width", "num_inference_steps", "output_type")}
    plans = [pipe.plan(**sizes, device="cuda") for pipe in (known, mine)]
    of_known, of_mine = (
        [(one.name, one.components, one.activations, one.vram) for one in plan.stages] for plan in plans
    )
    assert of_mine == of_known


def test_a_wrapped_subclass_with_a_constructor_of_its_own_cannot_be_planned():
    pipe = under_fp8(Renamed, "mine")
    with pytest.raises(Unplannable, match="Renamed"):
        pipe.plan(height=32, width=48, num_inference_steps=2, output_type="latents", device="cuda")


def test_repeated_blocks_of_a_subclass_are_those_of_its_network():
    dit = tiny_z_image().dit
    mine = copy.copy(dit)
    mine.__class__ = Mine
    assert architecture_of(mine) is architecture_of(dit)
    assert names(compiled_stacks(mine)) == names(compiled_stacks(dit)) == ["noise_refiner", "context_refiner", "layers"]
    assert names(cached_stacks(mine)) == ["layers"]
    assert architecture_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("declared", "compiled", "cached"),
    [
        ({}, list(LISTS), list(LISTS)),
        ({"compiled_blocks": ("down",)}, ["down"], list(LISTS)),
        ({"compiled_blocks": (), "cached_blocks": ("up",)}, [], ["up"]),
        ({"cached_blocks": ()}, list(LISTS), []),
    ],
)
def test_blocks_for_each_use_are_declared_separately(monkeypatch, declared, compiled, cached):
    """All lists are streamed in each case. Those for compiling and for step caches are the same unless declared."""
    spec = declare(monkeypatch, ToyUnet, "toy_unet", repeated_blocks=LISTS, **declared)
    module = toy_unet()
    assert names(compiled_stacks(module)) == compiled
    assert names(cached_stacks(module)) == cached
    assert {block.name for block in partition_by(spec, module).blocks} >= {"down.0", "middle.3", "up.1"}


@pytest.mark.parametrize("field", ["repeated_blocks", "compiled_blocks", "cached_blocks"])
def test_a_list_that_is_not_there_is_named_with_the_nearest(monkeypatch, field):
    spec = declare(monkeypatch, ToyUnet, "toy_unet", **{"repeated_blocks": LISTS, field: ("downs",)})
    use = {
        "repeated_blocks": lambda module: partition_by(spec, module),
        "compiled_blocks": compiled_stacks,
        "cached_blocks": cached_stacks,
    }
    with pytest.raises(ValueError, match="'downs'.*; did you mean 'down'"):
        use[field](toy_unet())


def names(stacks):
    return [stack.name for stack in stacks]
