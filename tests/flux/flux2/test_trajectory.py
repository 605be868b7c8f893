"""Whole calls equal those of diffusers' pipelines (0.42) with the same tiny networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinPipeline, Flux2Pipeline
from PIL import Image

from flux2_oracles import SIZE, noise, packed, tiny_pipelines
from parity import TOLERANCE, relative_error

STEPS = {"num_inference_steps": 4, **SIZE}
LAYERS = {"text_encoder_out_layers": (1, 2, 3)}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dev():
    ours, parts = tiny_pipelines(klein=False)
    return ours, quiet(Flux2Pipeline(**parts))


@pytest.fixture(scope="module")
def klein():
    ours, parts = tiny_pipelines(klein=True)
    return ours, quiet(Flux2KleinPipeline(**parts))


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def latents_of(oracle, **arguments) -> torch.Tensor:
    out = oracle(**arguments, **LAYERS, output_type="latent").images
    if out.ndim == 4:
        return packed(out, oracle.vae)
    return out.mT.reshape(len(out), -1, SIZE["height"] // 16, SIZE["width"] // 16)  # dev's are packed tokens


def test_dev(dev) -> None:
    ours, oracle = dev
    expected = latents_of(oracle, prompt="a red apple", guidance_scale=2.5, latents=noise(7), **STEPS)
    arguments = {"seed": 7, "output_type": "latents", **STEPS}
    assert relative_error(ours("a red apple", embedded_guidance=2.5, **arguments), expected) < TOLERANCE
    assert relative_error(ours("a red apple", **arguments), expected) > 1e-2
    assert relative_error(ours("a red pear", embedded_guidance=2.5, **arguments), expected) > 1e-3


@pytest.mark.parametrize("cfg_scale", [1.0, 3.5])
def test_klein(klein, cfg_scale) -> None:
    ours, oracle = klein
    expected = latents_of(oracle, prompt="a red apple", guidance_scale=cfg_scale, latents=noise(3), **STEPS)
    latents = ours("a red apple", cfg_scale=cfg_scale, seed=3, output_type="latents", **STEPS)
    assert relative_error(latents, expected) < TOLERANCE


def test_images(klein) -> None:
    ours, oracle = klein
    expected = oracle(prompt="an apple", guidance_scale=1, latents=noise(3), **LAYERS, **STEPS).images[0]
    image = ours("an apple", seed=3, **STEPS)
    assert image.size == (SIZE["width"], SIZE["height"])
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_image_to_image(klein) -> None:
    """diffusers gets the noised image, and the levels of a schedule of strength 0.5 before the shift."""
    ours, oracle = klein
    image = random_image(SIZE["width"], SIZE["height"])
    start = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = packed(oracle.vae.encode(start).latent_dist.mode(), oracle.vae)
    sigmas = [0.625, 0.5, 0.375, 0.25]
    oracle.scheduler.set_timesteps(sigmas=sigmas, mu=ours_mu())
    first = float(oracle.scheduler.sigmas[0])
    noised = (1 - first) * clean + first * noise(5)
    expected = latents_of(oracle, prompt="an apple", guidance_scale=1, sigmas=sigmas, latents=noised, **STEPS)
    arguments = {"input_image": image, "denoising_strength": 0.5, "seed": 5, "output_type": "latents", **STEPS}
    assert relative_error(ours("an apple", **arguments), expected) < TOLERANCE


def ours_mu() -> float:
    from diffsynth.sampling.schedule import flux2_mu

    return flux2_mu(SIZE["height"] * SIZE["width"] // 256, num_steps=4)


@pytest.mark.parametrize("sizes", [[(64, 80)], [(64, 80), (102, 70), (80, 64)]])
def test_reference_images(dev, sizes) -> None:
    ours, oracle = dev
    images = [random_image(*size, seed=seed) for seed, size in enumerate(sizes)]
    expected = latents_of(oracle, prompt="a hat", image=images, guidance_scale=4.0, latents=noise(2), **STEPS)
    arguments = {"edit_image_auto_resize": False, "seed": 2, "output_type": "latents", **STEPS}
    latents = ours("a hat", edit_image=images if len(images) > 1 else images[0], **arguments)
    assert relative_error(latents, expected) < TOLERANCE
    assert relative_error(ours("a hat", edit_image=random_image(64, 80, seed=9), **arguments), expected) > 1e-3


def test_reference_images_of_klein_with_guidance(klein) -> None:
    ours, oracle = klein
    image = random_image(64, 80)
    expected = latents_of(oracle, prompt="a hat", image=[image], guidance_scale=3.0, latents=noise(2), **STEPS)
    arguments = {"edit_image_auto_resize": False, "seed": 2, "output_type": "latents", **STEPS}
    assert relative_error(ours("a hat", edit_image=image, cfg_scale=3.0, **arguments), expected) < TOLERANCE


def test_a_batch_of_prompts_of_different_lengths_equals_single_calls(dev) -> None:
    ours, _ = dev
    prompts = ["a", "a much longer prompt about a red apple on a table near a window"]
    arguments = {"num_inference_steps": 2, "height": 64, "width": 48, "output_type": "latents"}
    batch = ours(prompts, seed=[1, 2], **arguments)
    singles = torch.cat([ours(prompt, seed=seed, **arguments) for prompt, seed in zip(prompts, (1, 2), strict=True)])
    assert relative_error(batch, singles) < TOLERANCE


def test_given_noise_replaces_that_of_the_seed(klein) -> None:
    ours, _ = klein
    arguments = {"output_type": "latents", **STEPS}
    expected = ours("a", seed=3, **arguments)
    assert torch.equal(ours("a", initial_noise=noise(3), **arguments), expected)
    assert relative_error(ours(["a", "a"], initial_noise=noise(3), **arguments)[1:], expected) < TOLERANCE
    with pytest.raises(ValueError, match=r"initial_noise has the shape \(1, 16, 4, 3\); expected \(1, 16, 5, 3\)"):
        ours.check(prompt="a", initial_noise=noise(3, {"height": 64, "width": 48}), **arguments)


def test_sizes_are_rounded_up(klein) -> None:
    assert klein[0]("a", height=50, width=20, num_inference_steps=1, seed=0).size == (32, 64)


def test_inpainting(klein) -> None:
    """diffusers' inpainting also takes the image as a reference image; its mask covers whole tokens here."""
    ours, oracle = klein
    inpaint = quiet(Flux2KleinInpaintPipeline(**oracle.components, is_distilled=True))
    image, mask = random_image(64, 80), Image.new("L", (64, 80))
    mask.paste(255, (16, 0, 48, 32))
    call = {"height": 80, "width": 64, "num_inference_steps": 4}
    out = inpaint(
        prompt="a hat",
        image=image,
        mask_image=mask,
        strength=1.0,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
        **LAYERS,
        **call,
    ).images
    arguments = {"edit_image": image, "edit_image_auto_resize": False, "input_image": image, "inpaint_mask": mask}
    start = torch.randn(1, 16, 5, 4, generator=torch.Generator().manual_seed(4))
    latents = ours("a hat", initial_noise=start, output_type="latents", **arguments, **call)
    assert relative_error(latents, packed(out, oracle.vae)) < TOLERANCE
    arguments["inpaint_mask"] = Image.new("L", (64, 80), 255)
    white = ours("a hat", seed=4, output_type="latents", **arguments, **call)
    arguments["inpaint_mask"] = None
    assert torch.equal(white, ours("a hat", seed=4, output_type="latents", **arguments, **call))


def test_noise_that_is_given_takes_the_place_of_the_seed(klein) -> None:
    ours = klein[0]
    given = {"prompt": "a", "initial_noise": noise(0), "num_inference_steps": 1, "output_type": "latents", **SIZE}
    reason = "initial_noise is given"
    assert ours.arguments_without_effect(**given, seed=1) == {"seed": reason}
    assert torch.equal(ours(**given, seed=1), ours(**given, seed=2))
    assert ours.arguments_without_effect(**given, seed=1, solver="euler_ancestral") == {}
    assert ours.arguments_without_effect(**given, rand_device=torch.device("cpu")) == {"rand_device": reason}
    ours.check(**given, denoising_strength=0.5)  # the noise may be latents of another call
    with pytest.raises(ValueError, match=r"denoising_strength=0\.5 is given without input_image"):
        ours.check(prompt="a", denoising_strength=0.5)
