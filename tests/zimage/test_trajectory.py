"""Whole trajectories equal those of diffusers' pipelines with the same tiny networks."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageImg2ImgPipeline, ZImageTransformer2DModel
from diffusers import ZImagePipeline as OraclePipeline
from PIL import Image
from transformers import Qwen3Config, Qwen3Model

from diffsynth.models.config import FluxAutoencoderConfig, Qwen3TextEncoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage.config import ZImageDiTConfig
from diffsynth_zimage.dit import ZImageDiT
from parity import TOLERANCE, draw_weights, relative_error, shapes_of

DIT = {
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": (8, 8, 8),
}
AUTOENCODER = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 16}
SIZE = {"height": 208, "width": 176}


@pytest.fixture(scope="module")
def pipelines():
    oracle_dit = ZImageTransformer2DModel(in_channels=16, axes_lens=(1024, 64, 64), **DIT)
    oracle_vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **AUTOENCODER,
    )
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
    }
    tokenizer = byte_tokenizer()
    encoder = Qwen3Model(
        Qwen3Config(vocab_size=len(tokenizer), rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, **text)
    )
    for seed, module in enumerate((oracle_dit, oracle_vae, encoder)):
        module.eval().load_state_dict(draw_weights(shapes_of(module), seed=seed))

    dit, vae = ZImageDiT(ZImageDiTConfig(**DIT)), FluxAutoencoder(FluxAutoencoderConfig(norm_groups=4, **AUTOENCODER))
    text_encoder = Qwen3TextEncoder(
        Qwen3TextEncoderConfig(
            hidden_size=32,
            num_layers=3,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=48,
            vocab_size=len(tokenizer),
        )
    )
    dit.load_state_dict(oracle_dit.state_dict())
    vae.load_state_dict(oracle_vae.state_dict())
    text_encoder.model.load_state_dict(encoder.state_dict())
    ours = ZImagePipeline.from_components(
        dit=dit, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, device="cpu", torch_dtype=torch.float32
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        "vae": oracle_vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": oracle_dit,
    }
    oracles = OraclePipeline(**parts), ZImageImg2ImgPipeline(**parts)
    for oracle in oracles:
        oracle.set_progress_bar_config(disable=True)
    return ours, *oracles


def noise(seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, 16, SIZE["height"] // 8, SIZE["width"] // 8, generator=generator)


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
    from diffsynth_zimage.units import chat_text

    text = chat_text(ours.tokenizer, "an apple")
    assert text.startswith("<|im_start|>user\nan apple<|im_end|>\n<|im_start|>assistant\n")
    assert json.dumps(text)


def test_sizes_are_rounded_up(pipelines):
    image = pipelines[0]("a", height=200, width=170, num_inference_steps=1, seed=0)
    assert image.size == (176, 208)


def test_an_empty_prompt_is_fine(pipelines):
    latents = pipelines[0]("", height=32, width=32, num_inference_steps=1, seed=0, output_type="latents")
    assert torch.isfinite(latents).all()
