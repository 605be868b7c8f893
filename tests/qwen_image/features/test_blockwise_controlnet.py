"""Block-wise ControlNets in whole calls: masks, steps, several at once, with other features, under a policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import MissingComponent
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_qwen_image.blockwise_controlnet import BlockwiseControlNet, BlockwiseResiduals, Control
from diffsynth_qwen_image.controlnet_config import BlockwiseControlNetConfig
from diffsynth_qwen_image.dit import QwenImageDiT
from parity import draw_weights, relative_error, shapes_of
from qwen_image_oracles import DIT, SIZE, tiny_pipelines

PLAIN = BlockwiseControlNetConfig(dim=DIT.dim, n_layers=DIT.n_layers)
CALL = {"prompt": "a", "cfg_scale": 1, "num_inference_steps": 4, "seed": 7, "output_type": "latents", **SIZE}


def random_image(seed: int, mode: str = "RGB") -> Image.Image:
    shape = (SIZE["height"], SIZE["width"]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


EDGES, PHOTO = random_image(1), random_image(2)
MASK = Image.new("L", PHOTO.size)
MASK.paste(255, (16, 0, 48, 32))


def drawn(config: BlockwiseControlNetConfig, seed: int) -> BlockwiseControlNet:
    network = BlockwiseControlNet(config).eval().requires_grad_(False)
    network.load_state_dict(draw_weights(shapes_of(network), seed))
    return network


@pytest.fixture(scope="module")
def two():
    """Our pipeline with a ControlNet of a control image, and one that inpaints."""
    return tiny_pipelines(blockwise_controlnet=[drawn(PLAIN, 1), drawn(replace(PLAIN, additional_in_dim=4), 2)])[0]


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_a_call_is_eulers_method_with_the_network_of_the_extension(two, cfg_scale) -> None:
    """The control image is encoded as it is; one to inpaint is black where the mask is white, and the mask of the
    latents is 1 where it is kept. `test_blockwise_controlnet` of the network has the naive form of the forward pass.
    """
    inputs = [ControlNetInput(image=EDGES, scale=0.7), ControlNetInput(1, image=PHOTO, inpaint_mask=MASK, scale=0.4)]
    call = CALL | {"cfg_scale": cfg_scale, "negative_prompt": "blurry"}
    steps = []
    found = two(**call, blockwise_controlnet_inputs=inputs, on_step=steps.append)
    masked = pixels_of(PHOTO)
    masked[:, :, :32, 16:48] = -1
    kept = torch.ones(1, 1, 10, 6)
    kept[:, :, :4, 2:6] = 0
    latents = [two.vae.encode(pixels_of(EDGES)), torch.cat((two.vae.encode(masked), kept), dim=1)]
    first, second = two.blockwise_controlnet
    extension = BlockwiseResiduals([Control(first, latents[0], 0.7), Control(second, latents[1], 0.4)])
    embeds = [
        two.run_units(two.condition_units(), {"prompt": [prompt], **SIZE, "num_inference_steps": 4})["prompt_embeds"]
        for prompt in ("a", "blurry")
    ]
    x = torch.randn(1, 16, 10, 6, generator=torch.Generator().manual_seed(7))
    for step in steps:
        cond, uncond = (two.dit(x, torch.tensor([step.sigma]), each, extensions=[extension]) for each in embeds)
        x = x + (step.sigma_next - step.sigma) * (cond if cfg_scale == 1 else uncond + cfg_scale * (cond - uncond))
    assert relative_error(found, x) < 1e-4
    assert relative_error(two(**call), x) > 1e-2


def test_neutral_values_change_no_bit(two) -> None:
    plain = two(**CALL)
    for inputs in (None, [], ControlNetInput(image=EDGES, scale=0)):
        assert torch.equal(two(**CALL, blockwise_controlnet_inputs=inputs), plain)


def test_each_has_its_steps(two) -> None:
    """Only the steps between start and end have its hints."""
    seen: list[list[torch.Tensor]] = [[], []]
    for latents, end in zip(seen, (0.5, 0.0), strict=True):
        inputs = ControlNetInput(image=EDGES, end=end)
        two(**CALL, blockwise_controlnet_inputs=inputs, on_step=lambda step, to=latents: to.append(step.latents))
    assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [True, True, False, False]


def test_with_images_to_edit_and_in_the_context(two) -> None:
    """Their tokens get no hint, and both features have their effect."""
    inputs = {"blockwise_controlnet_inputs": ControlNetInput(image=EDGES)}
    others = {"context_image": PHOTO, "edit_image": PHOTO, "edit_image_auto_resize": False}
    both = two(**CALL, **inputs, **others)
    for fewer in (inputs, others, inputs | {"context_image": PHOTO}):
        assert relative_error(two(**CALL, **fewer), both) > 1e-3


@pytest.mark.parametrize("cache", ["first_block:threshold=0", "taylor:interval=1"])
def test_a_step_cache_that_reuses_nothing_changes_no_bit(two, cache) -> None:
    call = CALL | {"blockwise_controlnet_inputs": ControlNetInput(image=EDGES, end=0.5)}
    assert torch.equal(two(**call, step_cache=cache), two(**call))


@pytest.mark.parametrize("policy", ["cpu-offload", "dynamic"])
def test_a_policy_changes_no_bit(two, policy) -> None:
    """Its blocks run between those of the transformer."""
    call = CALL | {"blockwise_controlnet_inputs": ControlNetInput(image=EDGES), "num_inference_steps": 2}
    expected = two(**call)
    dit = QwenImageDiT(DIT).eval().requires_grad_(False)
    dit.load_state_dict(two.dit.state_dict())
    parts = two.components | {"dit": dit, "blockwise_controlnet": drawn(PLAIN, 1)}
    policies = {"dit": policy, "blockwise_controlnet": policy}
    pipe = type(two)(parts, device="cpu", torch_dtype=torch.float32, policy=policies)
    assert torch.equal(pipe(**call), expected)
    assert set(pipe.transfers) == {"dit", "blockwise_controlnet[0]"}


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (ControlNetInput(), ValueError, "blockwise_controlnet_inputs: an input needs one of image and inpaint_image"),
        (ControlNetInput(2, image=EDGES), ValueError, "controlnet_id=2, and 2 are loaded"),
        (ControlNetInput(1, image=EDGES), ValueError, "ControlNet 1 needs inpaint_mask"),
        (ControlNetInput(image=EDGES, inpaint_mask=MASK), ValueError, "takes a control image without a mask"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(two, inputs, error, message) -> None:
    with pytest.raises(error, match=message):
        two.check(prompt="a", blockwise_controlnet_inputs=inputs)


def test_without_a_controlnet_its_argument_is_refused(two) -> None:
    parts = two.components | {"blockwise_controlnet": None}
    pipe = type(two)(parts, device="cpu", torch_dtype=torch.float32)
    with pytest.raises(MissingComponent, match="needs blockwise_controlnet, which is not loaded; add its file"):
        pipe.check(prompt="a", blockwise_controlnet_inputs=ControlNetInput(image=EDGES))
