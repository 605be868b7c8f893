"""An image to vary in whole calls, against diffusers' prior and its pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

from diffsynth.errors import MissingComponent
from diffsynth.models.image_config import TINY_SIGLIP
from diffsynth.models.image_pixels import siglip_pixels
from flux1_oracles import (
    DIT,
    SIZE,
    load_tensors,
    noise,
    random_image,
    siglip_tensors,
    sigmas,
    tiny_pipelines,
    unpacked,
)
from parity import TOLERANCE, draw_weights, neutral_parameters, relative_error, shapes_of
from siglip_oracles import siglip_oracle

PHOTO = random_image(1)
GIVEN = {**SIZE, "num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 64}


@pytest.fixture(scope="module")
def networks():
    """transformers' image encoder and diffusers' projection, with random weights."""
    siglip = siglip_oracle(TINY_SIGLIP)
    redux = ReduxImageEncoder(redux_dim=TINY_SIGLIP.hidden_size, txt_in_features=DIT.context_dim).eval()
    redux.load_state_dict(draw_weights(shapes_of(redux), seed=6))
    return siglip, redux


@pytest.fixture(scope="module")
def pipelines(networks):
    siglip, redux = networks
    found, encoder = load_tensors(siglip_tensors(siglip))
    assert (found.architecture.name, found.config) == ("siglip_image_encoder", TINY_SIGLIP)
    ours, parts = tiny_pipelines(image_encoder=encoder, image_embedder=load_tensors(redux.state_dict())[1])
    oracle = FluxPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    return ours, oracle


@torch.no_grad()
def expected_tokens(networks) -> torch.Tensor:
    siglip, redux = networks
    return redux(siglip(siglip_pixels(PHOTO, TINY_SIGLIP.image_size)).last_hidden_state).image_embeds


@pytest.mark.parametrize("prompt", ["", "a red apple"])
@torch.no_grad()
def test_equals_diffusers(pipelines, networks, prompt):
    """Without a prompt the text is zero, as in diffusers without text encoders; with one it is encoded."""
    ours, oracle = pipelines
    text, pooled, _ = oracle.encode_prompt(prompt, None, max_sequence_length=64)
    if not prompt:
        text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    expected = oracle(
        **SIZE,
        prompt_embeds=torch.cat((text, expected_tokens(networks)), dim=1),
        pooled_prompt_embeds=pooled,
        guidance_scale=2.5,
        sigmas=sigmas(4),
        latents=noise(7),
        output_type="latent",
    ).images
    found = ours(prompt, **GIVEN, flux_redux_image=PHOTO, embedded_guidance=2.5)
    assert relative_error(found, unpacked(expected)) < TOLERANCE
    other = ours(prompt, **GIVEN, flux_redux_image=random_image(2), embedded_guidance=2.5)
    assert relative_error(other, found) > 1e-3


def test_every_parameter_of_the_encoder_matters(networks):
    siglip, redux = networks
    pixels = siglip_pixels(PHOTO, TINY_SIGLIP.image_size)
    keys = [name for name, _ in siglip.named_parameters() if name.endswith("k_proj.bias") or name.startswith("head.")]
    run = lambda: redux(siglip(pixels).last_hidden_state).image_embeds  # noqa: E731
    assert neutral_parameters(siglip, run, skip=keys) == []
    assert neutral_parameters(redux, run) == []


def test_the_negative_prompt_stays_a_text(pipelines):
    ours = pipelines[0]
    small = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "output_type": "latents", "cfg_scale": 2.0}
    calls = [
        ours("", **small, flux_redux_image=PHOTO, negative_prompt=text, t5_sequence_length=16) for text in ("a", "b")
    ]
    assert relative_error(*calls) > 1e-3


def test_its_networks_are_needed(pipelines):
    ours, _ = tiny_pipelines()
    with pytest.raises(MissingComponent, match="image_encoder"):
        ours.check(flux_redux_image=PHOTO)
