"""Whole calls equal those of diffusers' pipelines (0.42) with the same tiny networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline
from diffusers import QwenImagePipeline as OraclePipeline
from PIL import Image

import wan_vae_oracle
from diffsynth.core.lora import save_lora
from parity import TOLERANCE, relative_error
from qwen_image_oracles import (
    LIGHTNING_SCHEDULER,
    SIZE,
    counted_prefix,
    noise,
    packed,
    tiny_pipelines,
    unpacked,
)

STEPS = {"num_inference_steps": 4, **SIZE}
PROMPTS = {"prompt": "a red apple on a table", "negative_prompt": "blurry"}


def oracle_of(kind, parts):
    oracle = kind(**parts)
    oracle.set_progress_bar_config(disable=True)
    # The published tokenizer has 34 tokens before the prompt, this one has one for each byte.
    oracle.prompt_template_encode_start_idx = counted_prefix(parts["tokenizer"], oracle.prompt_template_encode)
    return oracle


@pytest.fixture(scope="module")
def pipelines():
    ours, parts = tiny_pipelines()
    return ours, oracle_of(OraclePipeline, parts), parts


def random_image(width: int = SIZE["width"], height: int = SIZE["height"], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def latents_of(vae, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        return wan_vae_oracle.latents_of(vae, pixels)[:, :, 0]


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_text_to_image(pipelines, cfg_scale) -> None:
    """diffusers scales each token of the guided velocity, which is our guidance `token_norm`."""
    ours, oracle, _ = pipelines
    start = {"latents": packed(noise(7)), "output_type": "latent"}
    expected = unpacked(oracle(**PROMPTS, true_cfg_scale=cfg_scale, **start, **STEPS).images)
    call = {"seed": 7, "output_type": "latents", "cfg_scale": cfg_scale, **PROMPTS, **STEPS}
    assert relative_error(ours(**call, guidance="token_norm"), expected) < TOLERANCE
    assert relative_error(ours(**call | {"prompt": "a red pear"}), expected) > 1e-3
    if cfg_scale > 1:
        assert relative_error(ours(**call), expected) > 1e-2


def test_images(pipelines) -> None:
    ours, oracle, _ = pipelines
    arguments = {"prompt": "an apple", **STEPS}
    expected = oracle(**arguments, true_cfg_scale=1, latents=packed(noise(3))).images[0]
    image = ours(**arguments, cfg_scale=1, seed=3)
    assert image.size == (SIZE["width"], SIZE["height"])
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_prompts_of_different_lengths(pipelines) -> None:
    ours, oracle, _ = pipelines
    prompts = ["a", "a much longer prompt about a red apple on a table near a window"]
    start = {"latents": packed(torch.cat((noise(1), noise(2)))), "output_type": "latent"}
    expected = unpacked(oracle(prompt=prompts, true_cfg_scale=1, **start, **STEPS).images)
    arguments = {"cfg_scale": 1, "output_type": "latents", **STEPS}
    batch = ours(prompts, seed=[1, 2], **arguments)
    assert relative_error(batch, expected) < TOLERANCE
    assert relative_error(ours(prompts[0], seed=1, **arguments), batch[:1]) < TOLERANCE


@pytest.mark.parametrize("steps", [4, 8])
def test_the_lora_of_lightning_sets_its_schedule(steps, tmp_path) -> None:
    """Known by its file's name; the oracle gets the LoRA in its weights, and the schedule by hand."""
    ours, parts = tiny_pipelines(scheduler=LIGHTNING_SCHEDULER)
    name = "transformer_blocks.1.attn.to_q"
    down, up = torch.randn(2, 64, generator=torch.Generator().manual_seed(steps)), torch.ones(64, 2) / 16
    file = tmp_path / f"Qwen-Image-Lightning-{steps}steps-V1.0.safetensors"
    save_lora({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)
    plain = ours("a red apple", seed=7, output_type="latents", **STEPS)
    ours.load_lora(ours.dit, file, hotload=True)
    with torch.no_grad():
        parts["transformer"].get_submodule(name).weight += up @ down
    oracle = oracle_of(OraclePipeline, parts)
    start = {"latents": packed(noise(7)), "output_type": "latent"}
    call = {"prompt": "a red apple", **SIZE}
    expected = unpacked(oracle(**call, num_inference_steps=steps, true_cfg_scale=1, **start).images)
    assert relative_error(ours(**call, seed=7, output_type="latents"), expected) < TOLERANCE
    ours.clear_lora()
    assert torch.equal(ours("a red apple", seed=7, output_type="latents", **STEPS), plain)


@pytest.mark.parametrize("steps", [4, 8])
def test_lightning(steps) -> None:
    ours, parts = tiny_pipelines(scheduler=LIGHTNING_SCHEDULER)
    oracle = oracle_of(OraclePipeline, parts)
    start = {"latents": packed(noise(7)), "output_type": "latent"}
    call = {"prompt": "a red apple", "num_inference_steps": steps, **SIZE}
    expected = unpacked(oracle(**call, true_cfg_scale=1, **start).images)
    arguments = {"cfg_scale": 1, "seed": 7, "output_type": "latents", **call}
    latents = ours(**arguments, lightning_schedule=True)
    assert relative_error(latents, expected) < TOLERANCE
    assert relative_error(ours(**arguments), expected) > 1e-3
    levels = oracle.scheduler.sigmas[:-1].tolist()
    assert relative_error(ours(**arguments, sigmas=levels), latents) < TOLERANCE


def test_image_to_image(pipelines) -> None:
    """diffusers skips steps; it gets the levels of a schedule of strength 0.5 as those after the skipped ones."""
    ours, _, parts = pipelines
    oracle, image = oracle_of(QwenImageImg2ImgPipeline, parts), random_image()
    expected = oracle(
        prompt="an apple",
        image=latents_of(parts["vae"], image),
        strength=0.5,
        sigmas=[1.0, 0.9, 0.8, 0.7, 0.5, 0.375, 0.25, 0.125],
        true_cfg_scale=1,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **SIZE,
    ).images
    arguments = {"input_image": image, "denoising_strength": 0.5, "seed": 5, "output_type": "latents", **STEPS}
    assert relative_error(ours("an apple", cfg_scale=1, **arguments), unpacked(expected)) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting(pipelines, strength) -> None:
    ours, _, parts = pipelines
    oracle, image = oracle_of(QwenImageInpaintPipeline, parts), random_image()
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 0, 48, 32))
    clean = latents_of(parts["vae"], image)
    levels = [0.5, 0.375, 0.25, 0.125] if strength < 1 else [1.0, 0.75, 0.5, 0.25]
    expected = oracle(
        prompt="a hat",
        image=clean,
        mask_image=mask,
        masked_image_latents=clean,
        strength=strength,
        sigmas=levels if strength == 1 else [1.0, 0.9, 0.8, 0.7, *levels],
        true_cfg_scale=1,
        num_inference_steps=len(levels),
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
        **SIZE,
    ).images
    arguments = {"input_image": image, "inpaint_mask": mask, "cfg_scale": 1, "seed": 4, "output_type": "latents"}
    latents = ours("a hat", denoising_strength=strength, **arguments, **STEPS)
    assert relative_error(latents, unpacked(expected)) < TOLERANCE
    assert torch.allclose(latents[:, :, 4:], clean[:, :, 4:], atol=1e-4)
    plain = ours("a hat", denoising_strength=strength, **arguments | {"inpaint_mask": None}, **STEPS)
    assert relative_error(plain, unpacked(expected)) > 1e-2
    arguments["inpaint_mask"] = Image.new("L", image.size, 255)
    assert torch.equal(ours("a hat", denoising_strength=strength, **arguments, **STEPS), plain)
