"""Whole trajectories equal those of diffusers' pipelines with the same tiny networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from diffsynth_flux.flux1.dit import patchify
from flux1_oracles import DIT, SIZE, noise, random_image, sigmas, tiny_pipelines, unpacked
from parity import TOLERANCE, relative_error

CALL = {"prompt": "a red apple on a table", "negative_prompt": "blurry", **SIZE}


@pytest.fixture(scope="module")
def pipelines():
    ours, parts = tiny_pipelines()
    oracles = FluxPipeline(**parts), FluxImg2ImgPipeline(**parts)
    for oracle in oracles:
        oracle.set_progress_bar_config(disable=True)
    return ours, *oracles


@pytest.mark.parametrize(("cfg_scale", "guidance"), [(1.0, 3.5), (2.5, 2.0)])
def test_text_to_image(pipelines, cfg_scale, guidance):
    ours, oracle, _ = pipelines
    expected = oracle(
        **CALL,
        true_cfg_scale=cfg_scale,
        guidance_scale=guidance,
        sigmas=sigmas(4),
        latents=noise(7),
        output_type="latent",
        max_sequence_length=128,
    ).images
    call = {"num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 128}
    latents = ours(**CALL, **call, cfg_scale=cfg_scale, embedded_guidance=guidance)
    assert relative_error(latents, unpacked(expected)) < TOLERANCE
    if cfg_scale > 1:
        unguided = ours(**CALL, **call, embedded_guidance=guidance)
        assert relative_error(unguided, unpacked(expected)) > 1e-2
        assert relative_error(ours(**CALL, **call), unguided) > 1e-3


def test_images(pipelines):
    ours, oracle, _ = pipelines
    call = {"prompt": "a red apple", **SIZE}
    expected = oracle(**call, sigmas=sigmas(2, shift=1.5), latents=noise(3), output_type="pil").images[0]
    image = ours(**call, seed=3, num_inference_steps=2, sigma_shift=1.5)
    assert image.size == (SIZE["width"], SIZE["height"])
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("guided", [True, False])
def test_the_original_schedule(guided):
    """A network without the guidance input, as schnell's, has it by default; sigmas are those that diffusers makes."""
    ours, parts = tiny_pipelines(replace(DIT, guidance_embed=guided))
    settings = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=1.0, **(settings if guided else {}))
    oracle = FluxPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    call = {"prompt": "a red apple", "num_inference_steps": 4, **SIZE}
    expected = oracle(**call, guidance_scale=3.5, latents=noise(7), output_type="latent", max_sequence_length=64).images
    call |= {"seed": 7, "output_type": "latents", "t5_sequence_length": 64}
    assert relative_error(ours(**call, original_schedule=True), unpacked(expected)) < TOLERANCE
    default = relative_error(ours(**call), unpacked(expected))
    assert default > 1e-3 if guided else default < TOLERANCE


def test_image_to_image(pipelines):
    """diffusers starts inside its schedule, ours has all its steps: the same levels are given to both."""
    ours, _, oracle = pipelines
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE["height"], SIZE["width"], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    levels = sigmas(4, strength=0.5)
    with torch.no_grad():
        moments = oracle.vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
    clean = (moments - oracle.vae.config.shift_factor) * oracle.vae.config.scaling_factor
    noised = (1 - levels[0]) * clean + levels[0] * noise(5, packed=False)
    call = {"prompt": "a red apple", **SIZE}
    expected = oracle(
        **call,
        image=image,
        strength=1.0,
        num_inference_steps=4,
        sigmas=levels,
        guidance_scale=3.5,
        latents=patchify(noised),
        output_type="latent",
    ).images
    latents = ours(
        **call, input_image=image, denoising_strength=0.5, num_inference_steps=4, seed=5, output_type="latents"
    )
    assert relative_error(latents, unpacked(expected)) < TOLERANCE


def test_a_batch_of_prompts_of_different_lengths_equals_single_calls(pipelines):
    ours = pipelines[0]
    prompts = ["a", "a much longer prompt about a red apple on a table near a window", "a"]
    call = {"num_inference_steps": 2, "height": 64, "width": 48, "output_type": "latents", "t5_sequence_length": 96}
    batch = ours(prompts, seed=[1, 2, 3], **call)
    singles = torch.cat([ours(prompt, seed=seed, **call) for prompt, seed in zip(prompts, (1, 2, 3), strict=True)])
    assert relative_error(batch, singles) < TOLERANCE


def test_what_is_cut_of_a_prompt_is_logged(pipelines, caplog):
    ours = pipelines[0]
    prompt = "0123456789" * 8 + "tail"
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "output_type": "latents"}
    latents = ours(prompt, **call)
    assert [record.getMessage() for record in caplog.records if "CLIP" in record.getMessage()] == [
        "CLIP takes 77 tokens; T5 alone takes '789tail'"
    ]
    caplog.clear()
    cut = ours(prompt, **call, t5_sequence_length=81)
    assert "T5 takes t5_sequence_length=81 tokens; these are not used: 'ail'" in caplog.text
    assert relative_error(cut, latents) > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t5_sequence_length": 513}, "t5_sequence_length=513: expected"),
        ({"t5_sequence_length": 0}, "t5_sequence_length=0: expected"),
        ({"embedded_guidance": float("nan")}, "embedded_guidance=nan: expected a number"),
        ({"tile_size": 16, "tile_stride": 32}, "tile"),
    ],
)
def test_values_out_of_range_are_refused(pipelines, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipelines[0].check(prompt="a", **arguments)


def test_an_empty_prompt_is_fine(pipelines):
    latents = pipelines[0]("", height=24, width=32, num_inference_steps=1, seed=0, output_type="latents")
    assert latents.shape == (1, 16, 4, 4)
    assert torch.isfinite(latents).all()


def test_a_network_of_other_channels_is_refused():
    ours, _ = tiny_pipelines(replace(DIT, in_channels=100))
    with pytest.raises(ValueError, match="takes 9 channels beside those of the latents; this version has no inputs"):
        ours.check(prompt="a")


def test_a_network_without_guidance_refuses_it():
    ours, _ = tiny_pipelines(replace(DIT, guidance_embed=False))
    with pytest.raises(ValueError, match="embedded_guidance=2.0 is given, but this network takes no guidance"):
        ours.check(prompt="a", embedded_guidance=2.0)
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "output_type": "latents"}
    assert torch.isfinite(ours("a", **call)).all()


def test_an_input_without_effect_is_said(pipelines):
    ours, image = pipelines[0], random_image(0)
    call = {"prompt": "a", **SIZE, "num_inference_steps": 1, "seed": 0, "output_type": "latents"}
    assert ours.arguments_without_effect(**call, input_image=image) == {"input_image": "denoising_strength is 1"}
    assert torch.equal(ours(**call, input_image=image), ours(**call))
    inpainted = {"input_image": image, "inpaint_mask": image.convert("L")}
    assert ours.arguments_without_effect(**call, **inpainted) == {}
    assert ours.arguments_without_effect(**call, tile_size=96) == {"tile_size": "output_type is 'latents'"}
    assert ours.arguments_without_effect(**{**call, "output_type": "pil"}, tile_size=96) == {
        "tile_size": "tiled is off"
    }
    assert ours.arguments_without_effect(**{**call, "output_type": "pil"}, tile_size=96, tiled=True) == {}
    with pytest.raises(ValueError, match=r"denoising_strength=0\.5 is given without input_image"):
        ours.check(prompt="a", denoising_strength=0.5)
