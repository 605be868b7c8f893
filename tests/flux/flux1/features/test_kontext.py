"""Reference images of Kontext in whole calls, one against diffusers' pipeline, several against its transformer."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import FluxKontextPipeline

from diffsynth_flux.flux1.dit import grid_positions, patchify, unpatchify
from flux1_oracles import SIZE, noise, random_image, sigmas, tiny_pipelines, unpacked
from parity import TOLERANCE, relative_error

FIRST, SECOND = random_image(1), random_image(2, size={"height": 80, "width": 97})
CALL = {"prompt": "make it blue", **SIZE}
GIVEN = {"num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 64}


@pytest.fixture(scope="module")
def pipelines():
    ours, parts = tiny_pipelines()
    oracle = FluxKontextPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    return ours, oracle


def test_one_reference(pipelines):
    ours, oracle = pipelines
    expected = oracle(
        **CALL,
        image=FIRST,
        guidance_scale=2.5,
        sigmas=sigmas(4),
        latents=noise(7),
        output_type="latent",
        max_sequence_length=64,
        max_area=SIZE["height"] * SIZE["width"],
        _auto_resize=False,
    ).images
    found = ours(**CALL, **GIVEN, kontext_images=FIRST, embedded_guidance=2.5)
    assert relative_error(found, unpacked(expected)) < TOLERANCE
    assert relative_error(ours(**CALL, **GIVEN, embedded_guidance=2.5), found) > 1e-3


@torch.no_grad()
def test_two_references_of_different_sizes(pipelines):
    """Both have the reference index 1; the second is cropped to multiples of 16."""
    ours, oracle = pipelines
    found = ours(**CALL, **GIVEN, kontext_images=[FIRST, SECOND])
    prompt, pooled, text_ids = oracle.encode_prompt(CALL["prompt"], None, max_sequence_length=64)
    latents = []
    for image, size in ((FIRST, (208, 176)), (SECOND.crop((0, 0, 96, 80)), (80, 96))):
        pixels = oracle.image_processor.preprocess(image, *size)
        mean = oracle.vae.encode(pixels).latent_dist.mode()
        latents.append((mean - oracle.vae.config.shift_factor) * oracle.vae.config.scaling_factor)
    ids = [grid_positions(13, 11), *(grid_positions(x.shape[2] // 2, x.shape[3] // 2, index=1) for x in latents)]
    x, levels = noise(7), [*sigmas(4), 0.0]
    for level, following in itertools.pairwise(levels):
        tokens = torch.cat((x, *map(patchify, latents)), dim=1)
        velocity = oracle.transformer(
            tokens,
            prompt,
            pooled,
            torch.tensor([level]),
            torch.cat(ids),
            text_ids,
            torch.tensor([3.5]),
            return_dict=False,
        )[0]
        x = x + (following - level) * velocity[:, : x.shape[1]]
    assert relative_error(found, unpatchify(x, 13)) < TOLERANCE
    assert relative_error(ours(**CALL, **GIVEN, kontext_images=[FIRST]), found) > 1e-3
