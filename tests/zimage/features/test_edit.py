"""Reference images in whole calls, against diffusers' pipeline for Omni-Base."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageOmniPipeline
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from diffsynth.errors import MissingComponent
from diffsynth_zimage.config import Siglip2ImageEncoderConfig
from diffsynth_zimage.features import edit
from diffsynth_zimage.features.edit import edit_size
from diffsynth_zimage.image_encoders import Siglip2ImageEncoder
from diffsynth_zimage.units import chat_segments
from parity import TOLERANCE, relative_error
from siglip_oracles import siglip2_oracle
from z_image_oracles import SIZE, noise, tiny_pipelines

SIGLIP = Siglip2ImageEncoderConfig(
    hidden_size=48, num_heads=2, num_layers=1, intermediate_size=40, num_positions=16, max_patches=24
)
CALL = {"prompt": "make the apple red", "negative_prompt": "blurry", "num_inference_steps": 4}


class Oracle(ZImageOmniPipeline):
    """The oracle, whose autoencoder encodes in fp32: it rounds reference images to bf16, whatever its dtype is."""

    def prepare_image_latents(self, images, batch_size, device, dtype):
        config = self.vae.config
        latents = [
            ((self.vae.encode(image).latent_dist.mode()[0] - config.shift_factor) * config.scaling_factor).unsqueeze(1)
            for image in images
        ]
        return [list(latents) for _ in range(batch_size)]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture(scope="module")
def pipelines():
    siglip = siglip2_oracle(SIGLIP)
    encoder = Siglip2ImageEncoder(SIGLIP)
    encoder.load_state_dict({f"vision_model.{name}": weight for name, weight in siglip.named_parameters()})
    ours, parts = tiny_pipelines(siglip_feat_dim=SIGLIP.hidden_size, image_encoder=encoder)
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=SIGLIP.max_patches)
    oracle = Oracle(**parts, siglip=siglip, siglip_processor=processor)
    oracle.set_progress_bar_config(disable=True)
    return ours, oracle


@pytest.mark.parametrize(
    "images",
    [None, [photo(80, 112)], [photo(80, 112), photo(67, 130, 1), photo(96, 64, 2)]],
    ids=["none", "one", "three"],
)
def test_trajectories(pipelines, images) -> None:
    """Measured: 2.2e-6 at most."""
    ours, oracle = pipelines
    given = None if images is None else list(images)
    # diffusers writes guidance as v+ + s (v+ - v-), so its s is ours minus one.
    expected = oracle(**CALL, **SIZE, image=given, guidance_scale=2.5, latents=noise(7), output_type="latent").images
    latents = ours(**CALL, **SIZE, edit_image=images, cfg_scale=3.5, seed=7, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE
    if images is not None:
        fewer = ours(**CALL, **SIZE, edit_image=images[:-1] or None, cfg_scale=3.5, seed=7, output_type="latents")
        assert relative_error(fewer, expected) > 1e-2


def test_features_are_refined_once_for_each_branch(pipelines, monkeypatch) -> None:
    """They do not depend on the noise level: to the bit what refining them in every step gives."""
    ours, _ = pipelines
    call = {**CALL, "edit_image": photo(80, 48), "height": 64, "width": 48, "seed": 3, "output_type": "latents"}
    refined = []
    handle = ours.dit.siglip_refiner[0].register_forward_hook(lambda *_: refined.append(1))
    latents = ours(**call, cfg_scale=3.5)
    assert len(refined) == 2
    assert torch.equal(ours(**call, cfg_scale=3.5, edit_image_auto_resize=False), latents)
    assert len(refined) == 4
    velocity = type(ours).velocity
    monkeypatch.setattr(type(ours), "velocity", lambda *args, step, **given: velocity(*args, **given))
    assert torch.equal(ours(**call, cfg_scale=3.5), latents)
    assert len(refined) == 4 + 2 * CALL["num_inference_steps"]
    handle.remove()


def test_a_large_image_is_scaled_down(pipelines, monkeypatch) -> None:
    """The features are those of the scaled image, the latents those of its part whose sides are multiples of 16."""
    ours, _ = pipelines
    call = {**CALL, "height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "output_type": "latents"}
    large = photo(1400, 900)
    assert edit_size(large, auto_resize=True) == (821, 1277)
    assert edit_size(large, auto_resize=False) == (900, 1400)
    monkeypatch.setattr(edit, "AREA", 64 * 64)
    large = photo(100, 70)
    height, width = edit_size(large, auto_resize=True)
    assert (height, width) == (53, 76)
    scaled = large.resize((width, height), Image.Resampling.LANCZOS)
    assert torch.equal(ours(**call, edit_image=large), ours(**call, edit_image=scaled))
    assert not torch.equal(ours(**call, edit_image=large), ours(**call, edit_image=large, edit_image_auto_resize=False))


def test_a_batch_of_prompts_of_different_lengths_equals_single_calls(pipelines) -> None:
    ours, _ = pipelines
    prompts = ["a", "a much longer prompt about a red apple on a table near a window " * 3]
    call = {"edit_image": photo(80, 48), "num_inference_steps": 2, "height": 64, "width": 48, "output_type": "latents"}
    batch = ours(prompts, seed=[1, 2], **call)
    singles = torch.cat([ours(prompt, seed=seed, **call) for prompt, seed in zip(prompts, (1, 2), strict=True)])
    assert relative_error(batch, singles) < TOLERANCE


def test_segments_of_the_caption() -> None:
    """Reference images stand before the prompt, and the image that is computed in the answer."""
    assert chat_segments("a cat", images=2) == (
        "<|im_start|>user\n<|vision_start|>",
        "<|vision_end|><|vision_start|>",
        "<|vision_end|>a cat<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
        "<|vision_end|><|im_end|>",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edit_image": []}, "edit_image=.*it is empty"),
        ({"edit_image": "cat.png"}, "edit_image='cat.png': expected a PIL image"),
        ({"edit_image": photo(64, 8)}, "64x8 pixels; expected at least 16"),
        ({"edit_image": photo(64, 64), "edit_image_auto_resize": "no"}, "expected True or False"),
    ],
)
def test_bad_arguments(pipelines, arguments, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipelines[0].check(prompt="a", **arguments)


def test_other_networks_take_no_reference_images(pipelines) -> None:
    with pytest.raises(ValueError, match="edit_image needs Z-Image-Omni-Base"):
        tiny_pipelines()[0].check(prompt="a", edit_image=photo(64, 64))
    without = tiny_pipelines(siglip_feat_dim=48)[0]
    with pytest.raises(MissingComponent, match="edit_image needs image_encoder"):
        without.check(prompt="a", edit_image=photo(64, 64))
