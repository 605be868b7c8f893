"""A control image of FLUX.1-Depth and -Canny in whole calls, against diffusers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers import FluxControlPipeline

from flux1_oracles import DIT, SIZE, noise, random_image, sigmas, tiny_pipelines, unpacked
from parity import TOLERANCE, relative_error
from posterior import encode_to_the_mean

DEPTH = random_image(1)
CALL = {"prompt": "a red apple", **SIZE}
GIVEN = {"num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 64}


@pytest.fixture(scope="module")
def pipelines():
    ours, parts = tiny_pipelines(replace(DIT, in_channels=128))
    oracle = FluxControlPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    return ours, oracle


def test_equals_diffusers(pipelines, monkeypatch):
    encode_to_the_mean(monkeypatch)
    ours, oracle = pipelines
    expected = oracle(
        **CALL,
        control_image=DEPTH,
        guidance_scale=10.0,
        sigmas=sigmas(4),
        latents=noise(7),
        output_type="latent",
        max_sequence_length=64,
    ).images
    found = ours(**CALL, **GIVEN, control_image=DEPTH, embedded_guidance=10.0)
    assert relative_error(found, unpacked(expected)) < TOLERANCE
    other = ours(**CALL, **GIVEN, control_image=random_image(3), embedded_guidance=10.0)
    assert relative_error(other, found) > 1e-3


def test_a_batch_equals_single_calls(pipelines):
    ours = pipelines[0]
    call = {"prompt": "a", "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latents"}
    batch = ours(**call, seed=1, num_images=2, control_image=DEPTH, cfg_scale=2.0)
    assert relative_error(batch[1:], ours(**call, seed=2, control_image=DEPTH, cfg_scale=2.0)) < TOLERANCE


def test_a_missing_image_and_another_network(pipelines):
    with pytest.raises(ValueError, match="needs a control image; pass control_image"):
        pipelines[0].check(prompt="a")
    ours, _ = tiny_pipelines()
    with pytest.raises(ValueError, match="takes none; load FLUX.1-Depth-dev or FLUX.1-Canny-dev"):
        ours.check(prompt="a", control_image=DEPTH)
