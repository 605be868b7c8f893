"""Whole trajectories equal those of diffusers' pipelines with the same tiny networks."""

import json

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline
from diffusers import ZImagePipeline as OraclePipeline
from PIL import Image

from diffsynth.sampling.schedule import z_image_sigmas
from flow_schedulers import flow_scheduler, set_levels
from parity import TOLERANCE, relative_error
from z_image_oracles import SIZE, noise, tiny_pipelines


@pytest.fixture(scope="module")
def pipelines():
    ours, parts = tiny_pipelines()
    oracles = OraclePipeline(**parts), ZImageImg2ImgPipeline(**parts)
    for oracle in oracles:
        oracle.set_progress_bar_config(disable=True)
    return ours, *oracles


@pytest.mark.parametrize("cfg_scale", [1.0, 3.5])
def test_text_to_image(pipelines, cfg_scale):
    ours, oracle, _ = pipelines
    arguments = {"prompt": "a red apple on a table", "negative_prompt": "blurry", "num_inference_steps": 4, **SIZE}
    # diffusers writes guidance as v+ + s (v+ - v-), so its s is ours minus one; 0 is off.
    expected = oracle(**arguments, guidance_scale=cfg_scale - 1, latents=noise(7), output_type="latent").images
    latents = ours(**arguments, cfg_scale=cfg_scale, seed=7, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE
    if cfg_scale > 1:
        unguided = ours(**arguments, seed=7, output_type="latents")
        assert relative_error(unguided, expected) > 1e-2


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc"])
def test_other_solvers(solver):
    """diffusers' pipeline with its scheduler of the same name, which gets our noise levels: its own start at 1 - 1e-6.

    Measured: at most 1.0e-6; the latents of Euler are 0.09 or more away.
    """
    ours, parts = tiny_pipelines()
    scheduler = flow_scheduler(solver)

    def set_timesteps(num_inference_steps=None, device=None, *, sigmas, mu=None):
        set_levels(scheduler, z_image_sigmas(len(sigmas)))

    scheduler.set_timesteps = set_timesteps
    oracle = OraclePipeline(**{**parts, "scheduler": scheduler})
    oracle.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a red apple", "negative_prompt": "blurry", "num_inference_steps": 4, **SIZE}
    expected = oracle(**arguments, guidance_scale=1.5, latents=noise(7), output_type="latent").images
    call = arguments | {"cfg_scale": 2.5, "seed": 7, "output_type": "latents"}
    assert relative_error(ours(**call, solver=solver), expected) < TOLERANCE
    assert relative_error(ours(**call), expected) > 1e-3


def test_images(pipelines):
    ours, oracle, _ = pipelines
    arguments = {"prompt": "a red apple", "num_inference_steps": 4, **SIZE}
    expected = oracle(**arguments, guidance_scale=0, latents=noise(3), output_type="pil").images[0]
    image = ours(**arguments, seed=3)
    assert image.size == (SIZE["width"], SIZE["height"])
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_image_to_image(pipelines):
    """Strength 0.5 with 4 steps has the noise levels of the second half of diffusers' 8 steps."""
    ours, _, oracle = pipelines
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE["height"], SIZE["width"], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    start = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        moments = oracle.vae.encode(start).latent_dist.mode()
    clean = (moments - oracle.vae.config.shift_factor) * oracle.vae.config.scaling_factor
    sigma = 3 * 0.5 / (1 + 2 * 0.5)
    noised = (1 - sigma) * clean + sigma * noise(5)
    arguments = {"prompt": "a red apple", **SIZE}
    expected = oracle(
        **arguments,
        image=image,
        strength=0.5,
        num_inference_steps=8,
        guidance_scale=0,
        latents=noised,
        output_type="latent",
    ).images
    latents = ours(
        **arguments,
        input_image=image,
        denoising_strength=0.5,
        num_inference_steps=4,
        seed=5,
        output_type="latents",
    )
    assert relative_error(latents, expected) < TOLERANCE


def test_a_batch_of_prompts_of_different_lengths_equals_single_calls(pipelines):
    ours = pipelines[0]
    prompts = ["a", "a much longer prompt about a red apple on a table near a window " * 3]
    arguments = {"num_inference_steps": 2, "height": 64, "width": 48, "output_type": "latents"}
    batch = ours(prompts, seed=[1, 2], **arguments)
    singles = torch.cat([ours(prompt, seed=seed, **arguments) for prompt, seed in zip(prompts, (1, 2), strict=True)])
    assert relative_error(batch, singles) < TOLERANCE


def test_the_chat_template_is_applied(pipelines):
    ours = pipelines[0]
    from diffsynth_zimage.units import chat_segments

    (text,) = chat_segments("an apple", images=0)
    messages = [{"role": "user", "content": "an apple"}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    assert text == ours.tokenizer.apply_chat_template(messages, **options)
    assert text.startswith("<|im_start|>user\nan apple<|im_end|>\n<|im_start|>assistant\n")
    assert json.dumps(text)


def test_sizes_are_rounded_up(pipelines):
    image = pipelines[0]("a", height=200, width=170, num_inference_steps=1, seed=0)
    assert image.size == (176, 208)


def test_an_empty_prompt_is_fine(pipelines):
    latents = pipelines[0]("", height=32, width=32, num_inference_steps=1, seed=0, output_type="latents")
    assert torch.isfinite(latents).all()


def test_the_end_of_a_long_prompt_is_logged(pipelines, caplog):
    ours = pipelines[0]
    with caplog.at_level("WARNING"):
        ours("x" * 600 + "THE END", height=32, width=32, num_inference_steps=1, seed=0, output_type="latents")
    assert "is cut to 512; left out: " in caplog.text
    assert "THE END" in caplog.text
