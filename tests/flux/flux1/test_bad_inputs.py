"""Inputs that are wrong or of unusual forms: they are refused before anything runs, logged, or give the right image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import MissingComponent
from diffsynth.runtime.controlnet import ControlNetInput
from flux1_oracles import DIT, random_image, tiny_pipelines
from parity import relative_error

SIZE = {"height": 48, "width": 80}
CALL = {**SIZE, "num_inference_steps": 1, "seed": 0, "output_type": "latents", "t5_sequence_length": 32}
PHOTO, MASK = random_image(1, size=SIZE), random_image(2, "L", size=SIZE)

NETWORKS = {
    "input_image": (DIT, {"denoising_strength": 0.5}),
    "kontext_images": (DIT, {}),
    "flux_fill_image": (replace(DIT, in_channels=384), {"flux_fill_mask": MASK}),
    "control_image": (replace(DIT, in_channels=128), {}),
}
"""Argument with an image -> the transformer that takes it, and further arguments."""


@pytest.mark.parametrize("argument", NETWORKS)
def test_an_image_of_any_mode_is_the_same_image(argument):
    config, more = NETWORKS[argument]
    ours, _ = tiny_pipelines(config)
    grey = PHOTO.convert("L")
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    assert sixteen.mode == "I;16"
    expected = ours("a", **CALL, **more, **{argument: grey.convert("RGB")})
    for image in (grey, grey.convert("RGBA"), grey.convert("LA"), sixteen):
        assert torch.equal(ours("a", **CALL, **more, **{argument: image}), expected), image.mode
    assert relative_error(ours("a", **CALL, **more, **{argument: random_image(5, size=SIZE)}), expected) > 1e-4


@pytest.mark.parametrize(("image", "mask"), [("flux_fill_image", "flux_fill_mask"), ("input_image", "inpaint_mask")])
def test_a_mask_of_another_size_is_scaled(image, mask):
    config, _ = NETWORKS[image]
    ours, _ = tiny_pipelines(config)
    masks = []
    for factor in (1, 2):
        masks.append(Image.new("L", (factor * SIZE["width"] // 2, factor * SIZE["height"] // 2)))
        masks[-1].paste(255, tuple(factor * side for side in (8, 8, 24, 16)))
    found, expected = (ours("a", **CALL, **{image: PHOTO, mask: each}) for each in masks)
    white = ours("a", **CALL, **{image: PHOTO, mask: Image.new("L", masks[1].size, 255)})
    assert relative_error(found, expected) < relative_error(white, expected) / 4


def test_a_controlnet_input_without_its_model_is_refused():
    ours, _ = tiny_pipelines()
    with pytest.raises(MissingComponent, match="'controlnet_inputs' needs controlnet, which is not loaded"):
        ours.check(prompt="a", controlnet_inputs=[ControlNetInput(image=PHOTO)])


@pytest.mark.parametrize("argument", ["flux_fill_image", "control_image"])
def test_a_reference_image_for_a_network_that_cannot_take_it_is_refused(argument):
    config, more = NETWORKS[argument]
    ours, _ = tiny_pipelines(config)
    with pytest.raises(ValueError, match="kontext_images is given, but this network takes (80|16) channels beside"):
        ours.check(prompt="a", kontext_images=PHOTO, **more, **{argument: PHOTO})


def test_a_reference_image_for_a_model_that_was_not_trained_with_it_is_logged(caplog):
    ours, _ = tiny_pipelines()
    found = []
    for name in (None, "flux.1-kontext-dev", "flux.1-dev"):
        ours.model_name = name
        ours("a", **CALL, kontext_images=PHOTO)
        found.append([text for text in map(str, caplog.messages) if "kontext_images" in text])
    text = "kontext_images is given, and flux.1-dev was not trained with reference images; flux.1-kontext-dev was"
    assert found == [[], [], [text]]


def test_a_negative_prompt_without_guidance_is_logged_once(caplog):
    ours, _ = tiny_pipelines()
    call = CALL | {"num_inference_steps": 3}
    latents = ours("a", negative_prompt="blurry", **call)
    messages = [text for text in caplog.messages if "negative_prompt" in text]
    assert messages == ["negative_prompt has no effect: guidance is off (cfg_scale=1.0)"]
    assert torch.equal(latents, ours("a", **call))
