"""LoRAs of images: in a call, from the pipeline that returns them, from a file, and by the calls of older scripts."""

from __future__ import annotations

import pytest
import torch
from diffsynth.pipelines.z_image import ZImageUnit_Image2LoRADecode, ZImageUnit_Image2LoRAEncode
from PIL import Image
from safetensors.torch import load_file, save_file

import parity
from diffsynth.core.lora import merge_lora, save_lora
from diffsynth.core.vram import Policy
from diffsynth.core.vram.managed import managed
from diffsynth.errors import InvalidPipeline, MissingComponent
from diffsynth.models.dinov3 import Dinov3ImageEncoder
from diffsynth.models.image_config import (
    TINY_DINOV3,
    TINY_SIGLIP,
    ImageToLoRAConfig,
)
from diffsynth.models.image_pixels import dinov3_pixels, siglip_pixels
from diffsynth.models.siglip import SiglipImageEncoder
from diffsynth_zimage import ZImageImageToLoRAPipeline, ZImagePipeline
from diffsynth_zimage.image_to_lora import ZImageImageToLoRA
from diffsynth_zimage.image_to_lora_config import GROUPS
from tiny_z_image import SMALL, tiny_z_image

CALL = {**SMALL, "negative_prompt": "b", "num_inference_steps": 2, "cfg_scale": 3.0}
IMAGES = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.linear_gradient("L").resize((24, 32)).convert("RGB")]


def networks() -> dict[str, torch.nn.Module]:
    """Return tiny networks with random weights; the LoRA is for `tiny_z_image()`."""
    dim, ffn = 24, 64
    config = ImageToLoRAConfig(
        stacks=(
            ("layers_lora", "layers", 6),
            ("context_refiner_lora", "context_refiner", 1),
            ("noise_refiner_lora", "noise_refiner", 1),
        ),
        groups=(
            tuple((name, dim, dim) for name in GROUPS[0]),
            ((GROUPS[1][0], dim, ffn), (GROUPS[1][1], ffn, dim), (GROUPS[1][2], dim, ffn)),
        ),
        image_dim=TINY_SIGLIP.hidden_size + TINY_DINOV3.hidden_size,
        compress_dim=8,
    )
    parts = {
        "siglip2_image_encoder": SiglipImageEncoder(TINY_SIGLIP),
        "dinov3_image_encoder": Dinov3ImageEncoder(TINY_DINOV3),
        "image2lora_style": ZImageImageToLoRA(config),
    }
    for seed, module in enumerate(parts.values()):
        module.load_state_dict(parity.draw_weights(parity.shapes_of(module), seed=seed))
        module.requires_grad_(False)
    return parts


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    made = tiny_z_image()
    return ZImagePipeline.from_components(device="cpu", torch_dtype=torch.float32, **{**made.components, **networks()})


@pytest.fixture(scope="module")
def lora(pipe):
    return ZImageImageToLoRAPipeline.from_pipeline(pipe)(image2lora_images=IMAGES)


@torch.no_grad()
def test_the_lora_by_hand(pipe, lora):
    """Each image is cropped to a square of 1024 pixels; pooled outputs are joined, and the changes' mean is taken."""
    changes = []
    for image in IMAGES:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        scaled = image.resize((round(image.width * 1024 / side), round(image.height * 1024 / side)), 2)
        left, top = (scaled.width - 1024) // 2, (scaled.height - 1024) // 2
        square = scaled.crop((left, top, left + 1024, top + 1024))
        first = pipe.siglip2_image_encoder(siglip_pixels(square, 42, resample=Image.Resampling.BILINEAR), pooled=True)
        second = pipe.dinov3_image_encoder(dinov3_pixels(square, 224))
        changes.append(pipe.image2lora_style(torch.cat((first, second), dim=1)[0]))
    assert len(lora) == 2 * (4 + 3) * 8 == 2 * len(changes[0])
    for name, (down, up) in changes[0].items():
        found = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        mean = (up @ down + changes[1][name][1] @ changes[1][name][0]) / 2
        assert parity.relative_error(found, mean) < 1e-4
        assert tuple(lora[f"{name}.lora_A.weight"].shape) == (8, down.shape[1])


def test_several_images_are_the_mean_of_single_ones(pipe, lora):
    """Equal to `merge_lora` with alpha 1/n of the LoRAs of the single images."""
    maker = ZImageImageToLoRAPipeline.from_pipeline(pipe)
    merged = merge_lora([maker(image2lora_images=image) for image in IMAGES], alpha=0.5)
    assert merged.keys() == lora.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, lora[key], rtol=1e-4, atol=1e-5)


def test_in_a_call_it_is_a_lora_of_the_prompts_branch(pipe, lora, tmp_path):
    """To the bit the LoRA that the other pipeline returns, and the same read from files of either kind."""
    got = pipe("a", **CALL, image2lora_images=IMAGES)
    save_file(lora, tmp_path / "plain.safetensors")
    save_lora(lora, tmp_path / "saved.safetensors")
    given = (
        lora,
        load_file(tmp_path / "plain.safetensors"),
        *(tmp_path / f"{name}.safetensors" for name in ("plain", "saved")),
    )
    for each in given:
        assert torch.equal(pipe("a", **CALL, positive_only_lora=each), got)
    plain = pipe("a", **CALL)
    assert float((got - plain).abs().max()) > 1e-3
    both = pipe("a", **CALL, image2lora_images=IMAGES[0], positive_only_lora=lora)
    assert float((both - got).abs().max()) > 1e-3


def test_the_calls_of_older_scripts(pipe, lora):
    with torch.no_grad():
        embs = ZImageUnit_Image2LoRAEncode().process(pipe, image2lora_images=IMAGES)
        found = ZImageUnit_Image2LoRADecode().process(pipe, **embs)["lora"]
    assert found.keys() == lora.keys()
    assert all(torch.equal(found[key], lora[key]) for key in lora)


def test_under_a_policy_it_changes_no_bit(pipe, lora):
    options = {"device": "cpu", "torch_dtype": torch.float32, "policy": Policy.preset("cpu-offload", "cpu")}
    maker = ZImageImageToLoRAPipeline(networks(), **options)
    assert all(managed(part) is not None for part in maker.parts.values())
    found = maker(image2lora_images=IMAGES)
    assert all(torch.equal(found[key], lora[key]) for key in lora)


def test_what_is_refused(pipe):
    maker = ZImageImageToLoRAPipeline.from_pipeline(pipe)
    with pytest.raises(ValueError, match="image2lora_images=None: expected an image"):
        maker()
    with pytest.raises(MissingComponent, match="siglip2_image_encoder and dinov3_image_encoder"):
        tiny_z_image()("a", **SMALL, image2lora_images=IMAGES)
    with pytest.raises(MissingComponent, match="needs siglip2_image_encoder and"):
        ZImageImageToLoRAPipeline.from_pipeline(tiny_z_image())
    other = Dinov3ImageEncoder(TINY_DINOV3.__class__(hidden_size=128, num_layers=1, intermediate_size=16))
    wrong = ZImagePipeline.from_components(
        device="cpu", torch_dtype=torch.float32, **{**pipe.components, "dinov3_image_encoder": other}
    )
    with pytest.raises(InvalidPipeline, match="have 272 channels together, and image2lora_style takes 400"):
        wrong("a", **SMALL, image2lora_images=IMAGES)
