"""Inpainting of the input image with Z-Image, against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImageInpaintPipeline
from PIL import Image

from parity import TOLERANCE, relative_error
from posterior import encode_to_the_mean
from z_image_oracles import SIZE, tiny_pipelines

PIXELS = np.random.default_rng(0).integers(0, 255, (SIZE["height"], SIZE["width"], 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
BLOCKS = np.random.default_rng(3).integers(0, 2, (SIZE["height"] // 8, SIZE["width"] // 8), dtype=np.uint8)
MASK = Image.fromarray(np.kron(BLOCKS * 255, np.ones((8, 8), np.uint8)))


def test_equals_diffusers(monkeypatch):
    """diffusers puts the noised image outside of the mask after each step; the velocity leads there, too."""
    encode_to_the_mean(monkeypatch)
    ours, parts = tiny_pipelines()
    oracle = ZImageInpaintPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    call = {"prompt": "a red apple", **SIZE}
    expected = oracle(
        **call,
        image=PHOTO,
        mask_image=MASK,
        strength=1.0,
        guidance_scale=0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),  # latents that are given would be noised by other noise
        output_type="latent",
    ).images
    given = {"num_inference_steps": 4, "seed": 7, "output_type": "latents"}
    found = ours(**call, **given, input_image=PHOTO, inpaint_mask=MASK)
    assert relative_error(found, expected) < TOLERANCE
    whole = ours(**call, **given, input_image=PHOTO)
    assert relative_error(whole, found) > 1e-2
    white = ours(**call, **given, input_image=PHOTO, inpaint_mask=Image.new("L", PHOTO.size, 255))
    assert torch.equal(white, whole)


@pytest.mark.parametrize("guidance", ["cfg", "rescaled", "apg", "cfg_zero_star"])
@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
def test_what_is_kept_is_kept_by_any_guidance(guidance, solver):
    """Guidance that scales or projects velocities changed the part outside of the mask, by up to 18 %."""
    ours, _ = tiny_pipelines()
    call = {"num_inference_steps": 3, "seed": 7, "output_type": "latents", **SIZE, "input_image": PHOTO}
    guided = {"cfg_scale": 4.0, "negative_prompt": "blurry", "guidance": guidance, "solver": solver}
    kept = ours("", **call, inpaint_mask=Image.new("L", PHOTO.size))
    changed = ours("a red apple", **call, **guided, inpaint_mask=MASK)
    outside = torch.from_numpy(BLOCKS == 0).expand_as(kept)
    assert relative_error(changed[outside], kept[outside]) < 1e-5
    assert relative_error(changed[~outside], kept[~outside]) > 1e-2
