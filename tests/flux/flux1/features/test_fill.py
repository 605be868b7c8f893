"""An image to fill in whole calls, against diffusers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers import FluxFillPipeline

from flux1_oracles import DIT, SIZE, noise, random_image, sigmas, tiny_pipelines, unpacked
from parity import TOLERANCE, relative_error
from posterior import encode_to_the_mean

PHOTO, MASK = random_image(1), random_image(2, "L")
CALL = {"prompt": "a red apple", **SIZE}
GIVEN = {"num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 64}


@pytest.fixture(scope="module")
def pipelines():
    ours, parts = tiny_pipelines(replace(DIT, in_channels=384))
    oracle = FluxFillPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    return ours, oracle


def test_equals_diffusers(pipelines, monkeypatch):
    encode_to_the_mean(monkeypatch)
    ours, oracle = pipelines
    expected = oracle(
        **CALL,
        image=PHOTO,
        mask_image=MASK,
        guidance_scale=30.0,
        sigmas=sigmas(4),
        latents=noise(7),
        output_type="latent",
        max_sequence_length=64,
    ).images
    call = {**CALL, **GIVEN, "flux_fill_image": PHOTO, "embedded_guidance": 30.0}
    found = ours(**call, flux_fill_mask=MASK)
    assert relative_error(found, unpacked(expected)) < TOLERANCE
    assert relative_error(ours(**call, flux_fill_mask=random_image(3, "L")), found) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs an image to fill; pass flux_fill_image and flux_fill_mask"),
        ({"flux_fill_image": PHOTO}, "only one of flux_fill_image and flux_fill_mask"),
        ({"flux_fill_mask": MASK}, "only one of flux_fill_image and flux_fill_mask"),
        ({"flux_fill_image": PHOTO, "flux_fill_mask": MASK, "control_image": PHOTO}, "takes none"),
    ],
)
def test_what_does_not_fit_is_refused(pipelines, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipelines[0].check(prompt="a", **arguments)


def test_another_network_takes_no_image_to_fill():
    ours, _ = tiny_pipelines()
    with pytest.raises(ValueError, match="takes none; load FLUX.1-Fill-dev"):
        ours.check(prompt="a", flux_fill_image=PHOTO, flux_fill_mask=MASK)
