"""Inpainting of the input image with FLUX.1-dev, against diffusers."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxInpaintPipeline
from PIL import Image

from flux1_oracles import SIZE, noise, random_image, sigmas, tiny_pipelines, unpacked
from parity import TOLERANCE, relative_error
from posterior import encode_to_the_mean

PHOTO = random_image(1)
BLOCKS = np.random.default_rng(3).integers(0, 2, (SIZE["height"] // 8, SIZE["width"] // 8), dtype=np.uint8)
MASK = Image.fromarray(np.kron(BLOCKS * 255, np.ones((8, 8), np.uint8)))


def test_equals_diffusers(monkeypatch):
    """diffusers puts the noised image outside of the mask after each step; the velocity leads there, too."""
    encode_to_the_mean(monkeypatch)
    ours, parts = tiny_pipelines()
    oracle = FluxInpaintPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    call = {"prompt": "a red apple", **SIZE}
    expected = oracle(
        **call,
        image=PHOTO,
        mask_image=MASK,
        strength=1.0,
        guidance_scale=3.5,
        num_inference_steps=4,
        sigmas=sigmas(4),
        latents=noise(7, packed=False),
        output_type="latent",
        max_sequence_length=64,
    ).images
    given = {"num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 64}
    found = ours(**call, **given, input_image=PHOTO, inpaint_mask=MASK)
    assert relative_error(found, unpacked(expected)) < TOLERANCE
    whole = ours(**call, **given, input_image=PHOTO)
    assert relative_error(whole, found) > 1e-2
    white = ours(**call, **given, input_image=PHOTO, inpaint_mask=Image.new("L", PHOTO.size, 255))
    assert torch.equal(white, whole)
