"""Sizes of reference images, and calls that are refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffsynth.errors import MissingComponent
from diffsynth_flux import Flux2ImagePipeline
from diffsynth_flux.flux2.features.edit import edit_size
from flux2_oracles import tiny_pipelines


@pytest.fixture(scope="module")
def pipe() -> Flux2ImagePipeline:
    return tiny_pipelines(klein=True)[0]


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "green")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 1024), (1024, 1024)), ((100, 100), (1024, 1024)), ((4000, 2000), (736, 1440)), ((30, 90), (1760, 576))],
)
def test_automatic_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """The area is about 1024 x 1024 pixels and the sides are multiples of 32, for small images too."""
    assert edit_size(blank(*size), auto_resize=True) == expected


def test_without_resizing_the_sides_are_cut() -> None:
    assert edit_size(blank(102, 70), auto_resize=False) == (64, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edit_image": []}, "edit_image=.*it is empty"),
        ({"edit_image": [blank(64, 64)] * 11}, "edit_image has 11 images"),
        ({"edit_image": "cat.png"}, "edit_image='cat.png': expected a PIL image"),
        ({"edit_image": blank(64, 8), "edit_image_auto_resize": False}, "64x8 pixels; expected at least 16"),
        ({"edit_image": blank(64, 64), "edit_image_auto_resize": "no"}, "expected True or False"),
        ({"edit_image": blank(64, 64), "edit_image_kv_cache": 1}, "edit_image_kv_cache=1: expected True or False"),
        ({"inpaint_mask": blank(64, 64)}, "without input_image"),
        ({"inpaint_mask": [blank(64, 64)] * 2, "input_image": blank(64, 64)}, "inpaint_mask has 2 images; expected 1"),
        ({"inpaint_mask": blank(64, 64), "inpaint_blur_size": 0, "inpaint_blur_sigma": 1.0}, "at least 1"),
        ({"inpaint_mask": blank(64, 64), "inpaint_blur_size": 2, "inpaint_blur_sigma": 0.0}, "above 0"),
        ({"initial_noise": 3}, "initial_noise=3: expected a tensor"),
    ],
)
def test_bad_arguments(pipe, arguments, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.check(prompt="a", **arguments)


def test_an_image_with_transparency_or_16_bits_is_converted(pipe) -> None:
    call = {"edit_image_auto_resize": False, "height": 32, "width": 32, "num_inference_steps": 1, "seed": 0}
    expected = pipe("a", edit_image=blank(64, 64), output_type="latents", **call)
    transparent = pipe("a", edit_image=blank(64, 64).convert("RGBA"), output_type="latents", **call)
    assert torch.equal(transparent, expected)


def test_reference_images_need_the_autoencoder(pipe) -> None:
    parts = {role: pipe.components[role] for role in ("dit", "text_encoder", "tokenizer")}
    without = Flux2ImagePipeline.from_components(**parts, device="cpu", torch_dtype=torch.float32)
    with pytest.raises(MissingComponent, match="vae"):
        without("a", edit_image=blank(64, 64), height=32, width=32, num_inference_steps=1, output_type="latents")
