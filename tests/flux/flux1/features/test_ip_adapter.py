"""Image prompts in whole calls, against transformers' image encoder and a naive attention in diffusers' transformer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline

from diffsynth.errors import InvalidPipeline, MissingComponent
from diffsynth.models.image_config import TINY_SIGLIP
from diffsynth.models.image_pixels import siglip_pixels
from diffsynth_flux.flux1.config import TINY_IP_ADAPTER
from diffsynth_flux.flux1.dit import grid_positions, unpatchify
from diffsynth_flux.flux1.ip_adapter import FluxIPAdapter
from flux1_oracles import (
    DIT,
    SIZE,
    load_tensors,
    naive_image_prompt,
    noise,
    random_image,
    set_image_prompt,
    siglip_tensors,
    sigmas,
    tiny_pipelines,
)
from parity import TOLERANCE, draw_weights, neutral_parameters, relative_error, shapes_of
from siglip_oracles import siglip_oracle

WIDE = replace(DIT, dim=128, n_heads=1)
"""The transformer, with heads of the published 128 channels."""

PHOTO, OTHER = random_image(1), random_image(2, size={"height": 97, "width": 64})
CALL = {"prompt": "a red apple", "negative_prompt": "blurry", **SIZE}
GIVEN = {"num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 64}
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 0, "output_type": "latents"}


@pytest.fixture(scope="module")
def pipelines():
    weights = draw_weights(shapes_of(FluxIPAdapter(TINY_IP_ADAPTER)), seed=8)
    siglip = siglip_oracle(TINY_SIGLIP)
    encoder = load_tensors(siglip_tensors(siglip))[1]
    ours, parts = tiny_pipelines(WIDE, image_encoder=encoder, ipadapter=load_tensors(weights)[1])
    return ours, parts, siglip, weights


@torch.no_grad()
def oracle_latents(parts, siglip, weights, *, images, scale: float, cfg_scale: float) -> torch.Tensor:
    """The steps of a call, with the published formulas: the negative branch has an image prompt of zeros."""
    pipe = FluxPipeline(**parts)
    pixels = torch.cat([siglip_pixels(image, 42) for image in images])
    pooled = siglip(pixels).pooler_output
    branches = {"prompt": pooled, "negative_prompt": torch.zeros_like(pooled)}
    x, ids = noise(7), grid_positions(13, 11)
    for level, following in itertools.pairwise([*sigmas(4), 0.0]):
        velocity = {}
        for name, states in branches.items():
            text, vector, text_ids = pipe.encode_prompt(CALL[name], None, max_sequence_length=64)
            with set_image_prompt(parts["transformer"], naive_image_prompt(weights, states), scale):
                velocity[name] = parts["transformer"](
                    x, text, vector, torch.tensor([level]), ids, text_ids, torch.tensor([3.5]), return_dict=False
                )[0]
        difference = velocity["prompt"] - velocity["negative_prompt"]
        x = x + (following - level) * (velocity["negative_prompt"] + cfg_scale * difference)
    return unpatchify(x, 13)


@pytest.mark.parametrize(
    ("images", "scale", "cfg_scale"), [([PHOTO], 1.0, 1.0), ([PHOTO], 0.7, 2.0), ([PHOTO, OTHER], 0.7, 1.0)]
)
def test_equals_a_naive_implementation(pipelines, images, scale, cfg_scale):
    ours, parts, siglip, weights = pipelines
    expected = oracle_latents(parts, siglip, weights, images=images, scale=scale, cfg_scale=cfg_scale)
    given = images if len(images) > 1 else images[0]
    found = ours(**CALL, **GIVEN, ipadapter_images=given, ipadapter_scale=scale, cfg_scale=cfg_scale)
    assert relative_error(found, expected) < TOLERANCE
    for changed in ({"ipadapter_images": OTHER}, {"ipadapter_scale": 0.4}, {"ipadapter_images": None}):
        arguments = {"ipadapter_images": given, "ipadapter_scale": scale, "cfg_scale": cfg_scale} | changed
        assert relative_error(ours(**CALL, **GIVEN, **arguments), expected) > 1e-3, changed


def test_a_golden(pipelines):
    """The naive implementation has these latents, with weights, noise and image drawn from fixed seeds.

    The comparison above would not notice a change of both sides, of the oracle's code and ours. The numbers were
    computed by `oracle_latents` alone, with torch 2.15 and diffusers 0.42.1.
    """
    found = pipelines[0](**CALL, **GIVEN, ipadapter_images=PHOTO, ipadapter_scale=0.7, cfg_scale=2.0)
    golden = torch.tensor(GOLDEN)
    assert torch.allclose(found[0, ::5, 3, 4], golden, atol=1e-3 * float(golden.abs().max()))


GOLDEN = [-0.1300, -1.1508, 1.9854, -2.0692]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_a_scale_of_zero_is_to_the_bit_the_call_without_an_image(pipelines, cfg_scale):
    ours = pipelines[0]
    call = {"prompt": "a", "negative_prompt": "b", "cfg_scale": cfg_scale, **SMALL}
    plain = ours(**call)
    assert torch.equal(ours(**call, ipadapter_images=PHOTO, ipadapter_scale=0.0), plain)
    assert relative_error(ours(**call, ipadapter_images=PHOTO), plain) > 1e-3


def test_every_result_gets_the_image(pipelines):
    ours = pipelines[0]
    call = {**SMALL, "ipadapter_images": PHOTO, "cfg_scale": 2.0}
    both = ours(["a", "a longer prompt"], **{**call, "seed": [1, 2]})
    alone = [ours(text, **{**call, "seed": seed}) for text, seed in (("a", 1), ("a longer prompt", 2))]
    assert relative_error(both, torch.cat(alone)) < TOLERANCE


def test_with_a_step_cache(pipelines):
    """A cache that never finds two steps alike changes no bit; with one that skips blocks the image has an effect."""
    ours = pipelines[0]
    call = {"prompt": "a", **SMALL, "num_inference_steps": 6, "ipadapter_images": PHOTO}
    expected = ours(**call)
    assert torch.equal(ours(**call, step_cache="first_block:threshold=0.0"), expected)
    cached = ours(**call, step_cache="taylor:interval=3")
    assert not torch.equal(cached, expected)
    other = ours(**(call | {"ipadapter_images": OTHER}), step_cache="taylor:interval=3")
    assert relative_error(other, cached) > 1e-3


def test_the_image_encoder_and_its_head_equal_those_of_transformers(pipelines):
    ours, _, siglip, _ = pipelines
    pixels = siglip_pixels(PHOTO, 42)
    with torch.no_grad():
        assert relative_error(ours.image_encoder(pixels, pooled=True), siglip(pixels).pooler_output) < TOLERANCE
    # A bias of keys moves no softmax.
    skip = [name for name, _ in siglip.named_parameters() if name.endswith(("k_proj.bias", "in_proj_bias"))]
    assert neutral_parameters(siglip, lambda: siglip(pixels).pooler_output, skip=skip) == []


def test_what_is_missing_is_named(pipelines):
    ours, _ = tiny_pipelines(WIDE)
    with pytest.raises(MissingComponent, match="'ipadapter_images' needs image_encoder and ipadapter, which is not"):
        ours.check(prompt="a", ipadapter_images=PHOTO)
    with pytest.raises(ValueError, match=r"ipadapter_images=\[\]: expected a PIL image or a list"):
        pipelines[0].check(prompt="a", ipadapter_images=[])
    tensors = {name: tensor for name, tensor in siglip_tensors(pipelines[2]).items() if ".head." not in name}
    without_head = tiny_pipelines(WIDE, image_encoder=load_tensors(tensors)[1], ipadapter=pipelines[0].ipadapter)[0]
    with pytest.raises(MissingComponent, match="pooling head"):
        without_head.check(prompt="a", ipadapter_images=PHOTO)


def test_an_adapter_of_another_transformer_is_refused(pipelines):
    with pytest.raises(InvalidPipeline, match="number of blocks: ipadapter.n_blocks is 3 and dit.n_blocks is 4"):
        tiny_pipelines(replace(WIDE, n_single_blocks=3), ipadapter=pipelines[0].ipadapter)
