"""A control image in the context: its tokens, positions and place, by a second way to the same forward pass.

No other program computes it in a form that could be an oracle here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.core.lora import LoRA, LoRALayer, save_lora, target_layers
from diffsynth_qwen_image.checkpoints import LORA_TARGETS
from diffsynth_qwen_image.features.edit import References
from parity import TOLERANCE, relative_error
from qwen_image_oracles import SIZE, noise, packed, tiny_pipelines, unpacked

CALL = {"prompt": "a red apple", "cfg_scale": 1, "num_inference_steps": 4, "seed": 7, "output_type": "latents", **SIZE}


def random_image(width: int = SIZE["width"], height: int = SIZE["height"], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


EDGES = random_image(seed=1)


@pytest.fixture(scope="module")
def pipelines():
    return tiny_pipelines()


def latents_of(pipe, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return pipe.vae.encode(pixels)


@torch.no_grad()
def test_a_call_equals_diffusers_transformer_with_the_image_as_a_second_one(pipelines) -> None:
    """A reference: diffusers' transformer gets the tokens and the shape of the control image after those of the
    result, as for an image to edit, and the first tokens of its output are a step of Euler's method.
    """
    ours, parts = pipelines
    seen = []
    found = ours(**CALL, context_image=EDGES, on_step=lambda step: seen.append((step.sigma, step.sigma_next)))
    embeds = ours.run_units(ours.condition_units(), {"prompt": ["a red apple"], **SIZE, "num_inference_steps": 4})
    tokens, context = packed(noise(7)), packed(latents_of(ours, EDGES))
    grid = (1, SIZE["height"] // 16, SIZE["width"] // 16)
    for sigma, sigma_next in seen:
        velocity = parts["transformer"](
            hidden_states=torch.cat((tokens, context), dim=1),
            timestep=torch.tensor([sigma]),
            encoder_hidden_states=embeds["prompt_embeds"],
            encoder_hidden_states_mask=None,
            img_shapes=[[grid, grid]],
            return_dict=False,
        )[0][:, : tokens.shape[1]]
        tokens = tokens + (sigma_next - sigma) * velocity
    assert relative_error(found, unpacked(tokens)) < TOLERANCE
    assert relative_error(ours(**CALL), found) > 1e-2
    assert relative_error(ours(**CALL, context_image=random_image(seed=2)), found) > 1e-3


def test_without_an_image_no_bit_changes(pipelines) -> None:
    ours, _ = pipelines
    assert torch.equal(ours(**CALL, context_image=None), ours(**CALL))


def test_an_image_of_another_size_covers_the_result(pipelines) -> None:
    ours, _ = pipelines
    wide = Image.new("RGB", (2 * SIZE["width"], SIZE["height"]))
    wide.paste(EDGES, (SIZE["width"] // 2, 0))
    call = CALL | {"num_inference_steps": 1, "resize_mode": "crop"}
    assert torch.equal(ours(**call, context_image=wide), ours(**call, context_image=EDGES))


def test_its_tokens_come_before_those_of_images_to_edit(pipelines) -> None:
    ours, _ = pipelines
    edited = {"edit_image": random_image(48, 32, seed=3), "edit_image_auto_resize": False}
    values = ours.call_values(ours.check(**CALL, context_image=EDGES, **edited))
    for stage in ours.stages(ours.check(**CALL, context_image=EDGES, **edited))[:-2]:
        stage.run(values)
    conditions = values.for_branch("cond")
    extensions = ours.velocity_arguments(conditions)["extensions"]
    assert extensions == (conditions["context"], conditions["references"])
    assert all(isinstance(each, References) for each in extensions)
    assert [tuple(each.images[0].shape[2:]) for each in extensions] == [(10, 6), (4, 6)]


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_a_batch_shares_the_image(pipelines, cfg_scale) -> None:
    ours, _ = pipelines
    call = CALL | {"prompt": ["a", "a red apple"], "seed": [1, 2], "cfg_scale": cfg_scale, "num_inference_steps": 2}
    together = ours(**call, context_image=EDGES)
    for index in (0, 1):
        single = call | {"prompt": call["prompt"][index], "seed": call["seed"][index]}
        assert relative_error(ours(**single, context_image=EDGES), together[index : index + 1]) < TOLERANCE


def test_a_lora_of_zeros_changes_no_bit_and_another_does(pipelines, tmp_path) -> None:
    """The weights of In-Context-Control-Union are an ordinary LoRA of rank 64 for the transformer."""
    ours, _ = pipelines
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in target_layers(ours.dit, LORA_TARGETS):
        outputs, inputs = ours.dit.get_submodule(name).weight.shape
        layers[name] = LoRALayer(torch.randn(64, inputs, generator=generator) / 32, torch.zeros(outputs, 64))
    call = CALL | {"num_inference_steps": 2, "context_image": EDGES}
    plain = ours(**call)
    for up, same in ((0.0, True), (0.1, False)):
        file = tmp_path / f"{up}.safetensors"
        scaled = {name: LoRALayer(layer.down, layer.up + up, layer.alpha) for name, layer in layers.items()}
        save_lora(LoRA(scaled), file)
        ours.load_lora(ours.dit, str(file), hotload=True)
        assert torch.equal(ours(**call), plain) == same
        ours.clear_lora()


def test_what_is_no_image_is_refused(pipelines) -> None:
    ours, _ = pipelines
    with pytest.raises(TypeError, match="context_image='edges.png': expected a PIL image or None"):
        ours.check(prompt="a", context_image="edges.png")
