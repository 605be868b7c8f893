"""Layers equal those of diffusers' QwenImageLayeredPipeline (0.42)."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from einops import rearrange
from PIL import Image

import wan_vae_oracle
from diffsynth.runtime.writers import check_alpha, find_writer
from diffsynth_qwen_image.features.layers import LAYERS
from parity import TOLERANCE, relative_error
from qwen_image_oracles import SIZE, OracleProcessor, counted_prefix, tiny_pipelines

STEPS = {"num_inference_steps": 4, **SIZE}
PROMPTS = {"prompt": "a poster", "negative_prompt": "blurry"}


def random_image(seed: int = 0, mode: str = "RGBA", size: tuple[int, int] = (SIZE["width"], SIZE["height"])):
    levels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(levels)


IMAGE = random_image()
CALL = {"layer_input_image": IMAGE, "layer_num": 2, "layered_schedule": True, "output_type": "latents", **STEPS}
LAYER_IMAGES = [random_image(seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def pipelines():
    ours, parts = tiny_pipelines(layered=True)
    oracle = QwenImageLayeredPipeline(**parts, processor=OracleProcessor(parts["tokenizer"]))
    oracle.set_progress_bar_config(disable=True)
    oracle.prompt_template_encode_start_idx = counted_prefix(parts["tokenizer"], oracle.prompt_template_encode)
    return ours, oracle


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The size of the image: three columns and five rows of tokens, where diffusers has sizes of about 640 x 640."""
    monkeypatch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", lambda *_: (SIZE["width"], SIZE["height"]))


def decomposed(oracle, layers: int, seed: int = 7, **options):
    """Return diffusers' latents `b c t h w` after the last step, or its images."""
    generator, seen = torch.Generator().manual_seed(seed), []
    given = {"image": IMAGE, "num_inference_steps": 4, "output_type": "latent", "generator": generator}
    given["callback_on_step_end"] = lambda pipe, step, time, values: seen.append(values["latents"]) or {}
    with suppress(UnboundLocalError):  # diffusers 0.42 does not return latents
        return oracle(layers=layers, **given | options).images[0]
    rows, columns = SIZE["height"] // 16, SIZE["width"] // 16
    return rearrange(seen[-1], "b (t h w) (c p q) -> b c t (h p) (w q)", h=rows, w=columns, p=2, q=2)


def layer_latents(vae, images) -> torch.Tensor:
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        latents = wan_vae_oracle.latents_of(vae, pixels[:, :, None].float() / 127.5 - 1)
    return latents[:, :, 0].transpose(0, 1)[None]


@pytest.mark.parametrize(("layers", "cfg_scale"), [(2, 4.0), (0, 4.0), (3, 1.0)])
def test_latents_of_every_layer(pipelines, layers, cfg_scale) -> None:
    """The noise of a seed is drawn layer by layer. Zero layers are those of Qwen-Image-Layered-Control."""
    ours, oracle = pipelines
    expected = decomposed(oracle, layers, true_cfg_scale=cfg_scale, **PROMPTS)
    latents = ours(**CALL | PROMPTS | {"layer_num": layers, "cfg_scale": cfg_scale, "seed": 7})
    assert latents.shape == (1, 16, layers + 1, 10, 6)
    for index in range(layers + 1):
        assert relative_error(latents[:, :, index], expected[:, :, index]) < TOLERANCE
    others = {"layered_schedule": False, "prompt": "a child", "layer_input_image": LAYER_IMAGES[0]}
    for name, value in others.items():
        changed = ours(**CALL | PROMPTS | {"layer_num": layers, "cfg_scale": cfg_scale, "seed": 7, name: value})
        assert relative_error(changed, expected) > 1e-3, name


def test_scaled_guidance(pipelines) -> None:
    ours, oracle = pipelines
    expected = decomposed(oracle, 2, true_cfg_scale=4.0, cfg_normalize=True, **PROMPTS)
    latents = ours(**CALL | PROMPTS, cfg_scale=4.0, seed=7, guidance="token_norm")
    assert relative_error(latents, expected) < TOLERANCE


def test_images_have_transparency(pipelines) -> None:
    """diffusers leaves out the first image, which is the one that was given."""
    ours, oracle = pipelines
    expected = decomposed(oracle, 2, true_cfg_scale=1.0, prompt="a poster", output_type="pil")
    call = CALL | {"prompt": "a poster", "cfg_scale": 1.0, "seed": 7}
    images = ours(**call | {"output_type": "pil"})
    assert [(image.mode, image.size) for image in images] == [("RGBA", (48, 80))] * 3
    for image, other in zip(images[1:], expected, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1
    pixels = ours(**call | {"output_type": "tensor"})
    assert pixels.shape == (1, 4, 3, 80, 48)
    levels = ((pixels[0].transpose(0, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(levels, np.stack([np.asarray(image) for image in images]))


def test_files_without_transparency_are_refused(pipelines) -> None:
    """`diffsynth generate` asks it of the pipeline without weights, before the model is loaded."""
    check_alpha("a.png", find_writer("a.png").spec, pipelines[0])
    with pytest.raises(
        ValueError, match=r"returns images with transparency, which \.jpg cannot hold; expected .* \.png"
    ):
        check_alpha("a.jpg", find_writer("a.jpg").spec, pipelines[0])


def test_results_of_a_batch_are_those_of_single_calls(pipelines) -> None:
    ours, oracle = pipelines
    prompts = ["a", "a much longer prompt about a child with a balloon"]
    batch = ours(**CALL | {"prompt": prompts, "cfg_scale": 1.0, "seed": [1, 2]})
    for index, prompt in enumerate(prompts):
        expected = decomposed(oracle, 2, seed=index + 1, prompt=prompt, true_cfg_scale=1.0)
        assert relative_error(batch[index : index + 1], expected) < TOLERANCE
    images = ours(**CALL | {"prompt": prompts, "cfg_scale": 1.0, "num_inference_steps": 1, "output_type": "pil"})
    assert [len(layers) for layers in images] == [3, 3]


def test_an_image_of_another_size_is_scaled_to_the_result(pipelines) -> None:
    ours, _ = pipelines
    wide = Image.new("RGBA", (96, 80))
    wide.paste(IMAGE, (24, 0))
    call = CALL | {"prompt": "a", "seed": 1, "num_inference_steps": 1}
    cropped, stretched = (
        ours(**call | {"layer_input_image": wide, "resize_mode": mode}) for mode in ("crop", "stretch")
    )
    assert torch.equal(cropped, ours(**call))
    assert relative_error(stretched, cropped) > 1e-3


def test_image_to_image(pipelines) -> None:
    """diffusers' loop begins with the noised layers, at the levels of a schedule of strength 0.5."""
    ours, oracle = pipelines
    clean = layer_latents(oracle.vae, LAYER_IMAGES)
    arguments = {"prompt": "a poster", "cfg_scale": 1.0, "seed": 7, "input_image": LAYER_IMAGES}
    seen = []
    latents = ours(**CALL | arguments, denoising_strength=0.5, on_step=lambda step: seen.append(step.sigma))
    noise = torch.randn(1, 3, 16, 10, 6, generator=torch.Generator().manual_seed(7)).transpose(1, 2)
    start = rearrange((1 - seen[0]) * clean + seen[0] * noise, "b c t (h p) (w q) -> b (t h w) (c p q)", p=2, q=2)
    levels = {"latents": start, "sigmas": [0.5, 0.375, 0.25, 0.125]}
    expected = decomposed(oracle, 2, prompt="a poster", true_cfg_scale=1.0, **levels)
    assert relative_error(latents, expected) < TOLERANCE
    plain = {name: value for name, value in arguments.items() if name != "input_image"}
    assert relative_error(ours(**CALL | arguments), ours(**CALL | plain)) < 1e-6  # the first level rounds to 1 - 6e-8


def test_inpainting_keeps_all_layers_outside_of_the_mask(pipelines) -> None:
    ours, oracle = pipelines
    call = CALL | {"prompt": ["a", "b"], "seed": 1, "input_image": LAYER_IMAGES, "denoising_strength": 0.5}
    clean = layer_latents(oracle.vae, LAYER_IMAGES).expand(2, -1, -1, -1, -1)
    mask = Image.new("L", IMAGE.size)
    mask.paste(255, (0, 0, 48, 32))
    latents = ours(**call, inpaint_mask=mask)
    assert torch.allclose(latents[..., 4:, :], clean[..., 4:, :], atol=1e-4)
    assert relative_error(latents[..., :4, :], clean[..., :4, :]) > 1e-2
    assert torch.equal(ours(**call, inpaint_mask=Image.new("L", IMAGE.size, 255)), ours(**call))


@torch.no_grad()
def test_a_mask_in_the_context_comes_before_the_image(pipelines) -> None:
    """Layered-Control-V2, which diffusers has no pipeline for: its transformer gets the mask after the layer that is
    computed, at the next position, and the image last.
    """
    ours, oracle = pipelines
    call = CALL | {"prompt": "a poster", "cfg_scale": 1.0, "layer_num": 0}
    noise, seen, mask = torch.randn(1, 16, 10, 6, generator=torch.Generator().manual_seed(7)), [], LAYER_IMAGES[0]
    latents = ours(**call, seed=7, context_image=mask, on_step=lambda step: seen.append((step.sigma, step.sigma_next)))
    embeds, _ = oracle.encode_prompt("a poster")
    given = layer_latents(oracle.vae, [mask, IMAGE])[0].transpose(0, 1)
    tokens, *others = (rearrange(image, "c (h p) (w q) -> 1 (h w) (c p q)", p=2, q=2) for image in (noise[0], *given))
    for sigma, sigma_next in seen:
        velocity = oracle.transformer(
            hidden_states=torch.cat((tokens, *others), dim=1),
            timestep=torch.tensor([sigma]),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, 5, 3)] * 3],
            additional_t_cond=torch.zeros(1, dtype=torch.long),
            return_dict=False,
        )[0][:, : tokens.shape[1]]
        tokens = tokens + (sigma_next - sigma) * velocity
    expected = rearrange(tokens, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=5, w=3, p=2, q=2)
    assert relative_error(latents, expected) < TOLERANCE
    assert relative_error(ours(**call, seed=7), latents) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_input_image": None}, "Layered, and layer_input_image is not given; pass the image to take apart"),
        ({"layer_num": None}, "Layered, and layer_num is not given; pass the number of layers, or 0 for"),
        ({"layer_num": -1}, "layer_num=-1: expected an integer .*at least 0"),
        (
            {"layer_input_image": random_image(mode="RGB")},
            r"layer_input_image has an image of mode RGB, without transparency.*image\.convert\(\"RGBA\"\)",
        ),
        ({"context_image": random_image(mode="RGB")}, "context_image has an image of mode RGB, without transparency"),
        ({"input_image": LAYER_IMAGES[:2]}, "input_image has 2 images, and layer_num is 2; expected a list of 3 RGBA"),
        (
            {"input_image": [random_image(mode="RGB")] * 3},
            "input_image has an image of mode RGB, without transparency",
        ),
        ({"input_image": torch.zeros(3, 4, 80, 48)}, "input_image is a tensor, and layer_num is 2"),
        ({"exponential_shift_mu": 0.5}, "layered_schedule and exponential_shift_mu=0.5 are given; leave out one"),
        ({"lightning_schedule": True}, "layered_schedule and lightning_schedule=True are given"),
    ],
)
def test_bad_input_is_refused(pipelines, changes, message) -> None:
    ours, _ = pipelines
    with pytest.raises(ValueError, match=message):
        ours.check(**CALL | {"prompt": "a"} | changes)


def test_networks_that_do_not_fit_are_refused(pipelines) -> None:
    layered, plain = pipelines[0].components, tiny_pipelines()[0]
    with pytest.raises(ValueError, match="layer_num is given, and the transformer is not Qwen-Image-Layered"):
        plain.check(prompt="a", layer_num=1)
    with pytest.raises(ValueError, match="layer_input_image is given, .*; load qwen-image-layered, or leave"):
        plain.check(prompt="a", layer_input_image=IMAGE)
    values = {"layer_input_image": IMAGE, "layer_num": 1}
    configs = {"dit": layered["dit"].config, "vae": plain.vae.config}
    with pytest.raises(ValueError, match="autoencoder has 3 channels; load the one with four, Qwen/Qwen-Image-Lay"):
        LAYERS.check(configs, values)
    configs = {"dit": plain.dit.config, "vae": layered["vae"].config}
    with pytest.raises(ValueError, match="autoencoder has 4 channels, .*; load the autoencoder of Qwen/Qwen-Image"):
        LAYERS.check(configs, dict.fromkeys(values))
