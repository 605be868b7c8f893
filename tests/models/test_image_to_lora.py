"""ImageToLoRA: every number of a tiny network by hand, and the config that its shapes tell."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import parity
from diffsynth.models.image_config import ImageToLoRAConfig, infer_image_to_lora_config, tiny_image_to_lora_inputs
from diffsynth.models.image_to_lora import ImageToLoRA

STACKS = {"layers_lora": "layers", "refiner_lora": "refiner"}
GROUPS = (("attention.to_q", "attention.to_k"), ("feed_forward.w1",))
CONFIG = ImageToLoRAConfig(
    stacks=(("layers_lora", "layers", 2), ("refiner_lora", "refiner", 1)),
    groups=((("attention.to_q", 3, 5), ("attention.to_k", 3, 4)), (("feed_forward.w1", 3, 7),)),
    image_dim=6,
    compress_dim=2,
)
WITH_RESIDUAL = dataclasses.replace(
    CONFIG, stacks=(("", "layers", 2),), residual_length=3, residual_dim=5, residual_mid_dim=4
)


def drawn(config: ImageToLoRAConfig) -> tuple[ImageToLoRA, dict[str, torch.Tensor]]:
    network = ImageToLoRA(config)
    weights = parity.draw_weights(parity.shapes_of(network), seed=2)
    network.load_state_dict(weights)
    return network, weights


@torch.no_grad()
def test_matrices_by_hand():
    """A network is `W_out (W_in x + r)`, its result the rows of A and of B; blocks of one group follow each other."""
    network, weights = drawn(CONFIG)
    image = tiny_image_to_lora_inputs(CONFIG, torch.Generator().manual_seed(1))["image"]
    lora = network(image)
    assert list(lora) == [
        *(f"layers.{n}.attention.to_{name}" for n in range(2) for name in "qk"),
        *(f"layers.{n}.feed_forward.w1" for n in range(2)),
        *("refiner.0.attention.to_q", "refiner.0.attention.to_k", "refiner.0.feed_forward.w1"),
    ]
    places = {
        "layers.1.attention.to_k": ("layers_lora.blocks.1.layers.1", 3, 4),
        "layers.1.feed_forward.w1": ("layers_lora.blocks.3.layers.0", 3, 7),
        "refiner.0.feed_forward.w1": ("refiner_lora.blocks.1.layers.0", 3, 7),
    }
    for name, (place, inputs, outputs) in places.items():
        flat = [
            weights[f"{place}.proj_{each}.proj_out.weight"] @ (weights[f"{place}.proj_{each}.proj_in.weight"] @ image)
            for each in "ab"
        ]
        expected = (flat[0].view(4, inputs), flat[1].view(outputs, 4))
        assert all(parity.relative_error(*pair) < 1e-6 for pair in zip(lora[name], expected, strict=True))


@torch.no_grad()
def test_the_residual_by_hand():
    network, weights = drawn(WITH_RESIDUAL)
    inputs = tiny_image_to_lora_inputs(WITH_RESIDUAL, torch.Generator().manual_seed(1))
    block = "blocks.3"
    tokens = 0.05 * inputs["residual"] @ weights[f"{block}.proj_residual.proj_in.weight"].T
    inner = weights[f"{block}.proj_residual.proj_out.weight"] @ tokens.reshape(-1)
    first = weights[f"{block}.layers.0.proj_a.proj_in.weight"] @ inputs["image"]
    expected = (weights[f"{block}.layers.0.proj_a.proj_out.weight"] @ (first + inner)).view(4, 3)
    assert parity.relative_error(network(**inputs)["layers.1.feed_forward.w1"][0], expected) < 1e-5
    with pytest.raises(ValueError, match="the residual has 2 tokens; expected 3"):
        network(inputs["image"], inputs["residual"][:2])


@pytest.mark.parametrize("config", [CONFIG, WITH_RESIDUAL])
def test_every_parameter_matters(config):
    network, _ = drawn(config)
    inputs = tiny_image_to_lora_inputs(config, torch.Generator().manual_seed(1))
    run = lambda: torch.cat([each.flatten() for pair in network(**inputs).values() for each in pair])  # noqa: E731
    assert parity.neutral_parameters(network, run) == []


def test_gradients_reach_every_parameter():
    """These networks are trained through the LoRAs that they make."""
    network, _ = drawn(WITH_RESIDUAL)
    lora = network(**tiny_image_to_lora_inputs(WITH_RESIDUAL, torch.Generator().manual_seed(1)))
    sum((up @ down).square().sum() for down, up in lora.values()).backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in network.parameters())


def test_the_config_of_a_file():
    shapes = parity.shapes_of(ImageToLoRA(CONFIG))
    assert infer_image_to_lora_config(shapes, stacks=STACKS, groups=GROUPS) == CONFIG
    shapes = parity.shapes_of(ImageToLoRA(WITH_RESIDUAL))
    assert infer_image_to_lora_config(shapes, stacks={"": "layers"}, groups=GROUPS) == WITH_RESIDUAL
    as_json = {"stacks": [["", "layers", 2]], "groups": [[["a", 3, 5]]]}
    assert ImageToLoRAConfig(**as_json).groups == ((("a", 3, 5),),)


def test_other_files_are_refused():
    shapes = parity.shapes_of(ImageToLoRA(CONFIG))
    infer = lambda **changed: infer_image_to_lora_config(shapes, **{"stacks": STACKS, "groups": GROUPS, **changed})  # noqa: E731
    with pytest.raises(ValueError, match="layers_lora has 4 blocks; expected a multiple of 3"):
        infer(groups=(*GROUPS, ("x",)))
    with pytest.raises(ValueError, match="layers_lora.blocks.2.layers has 1 networks; expected 2"):
        infer(groups=(GROUPS[0], ("x", "y")))
    with pytest.raises(ValueError, match="expected multiples of the rank 5"):
        infer(rank=5)
