"""Edited images equal those of diffusers' pipelines (0.42), with one image and with several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from diffsynth.errors import MissingComponent, NotEnoughMemory
from diffsynth.runtime.prompt_weights import WeightedText
from diffsynth_qwen_image.features import edit
from diffsynth_qwen_image.prompts import ANSWER, segments, tokenize
from parity import TOLERANCE, relative_error
from qwen_image_oracles import (
    IMAGE_PIXELS,
    SIZE,
    OracleProcessor,
    counted_prefix,
    image_processor,
    noise,
    packed,
    tiny_pipelines,
    unpacked,
)

STEPS = {"num_inference_steps": 4, **SIZE}
PROMPTS = {"prompt": "make it red", "negative_prompt": "blurry"}
SIDES = ((100, 70), (64, 90), (70, 70))


@pytest.fixture(autouse=True)
def _small_areas(monkeypatch):
    """Sizes of images are a sixteenth of the published ones on each side, and multiples of 32 as those."""
    area, listed = 64 * 64, 24 * 24
    monkeypatch.setattr(edit, "AREA", area)
    monkeypatch.setattr(edit, "LISTED_AREA", listed)
    exact = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: exact(area, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", area)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", listed)


@pytest.fixture(scope="module")
def plain():
    return tiny_pipelines()


@pytest.fixture(scope="module")
def clean():
    return tiny_pipelines(zero_cond_t=True)


def oracle_of(kind, parts):
    oracle = kind(**parts, processor=OracleProcessor(parts["tokenizer"]))
    oracle.set_progress_bar_config(disable=True)
    template = oracle.prompt_template_encode.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    oracle.prompt_template_encode_start_idx = counted_prefix(parts["tokenizer"], template)
    encoder = oracle.text_encoder

    def with_types(input_ids, **arguments):
        """Pass the types, which diffusers leaves out; without them this transformers counts images as text."""
        types = (input_ids == encoder.config.image_token_id).int()
        return type(encoder).forward(encoder, input_ids=input_ids, mm_token_type_ids=types, **arguments)

    encoder.forward = with_types
    return oracle


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def images(count: int) -> list[Image.Image]:
    return [random_image(*size, seed=seed) for seed, size in enumerate(SIDES[:count])]


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_one_image(plain, cfg_scale) -> None:
    ours, parts = plain
    oracle, image = oracle_of(QwenImageEditPipeline, parts), images(1)[0]
    start = {"latents": packed(noise(7)), "output_type": "latent", "true_cfg_scale": cfg_scale}
    expected = unpacked(oracle(image=image, **PROMPTS, **start, **STEPS).images)
    call = {"seed": 7, "output_type": "latents", "cfg_scale": cfg_scale, "guidance": "token_norm", **PROMPTS, **STEPS}
    assert relative_error(ours(edit_image=image, **call), expected) < TOLERANCE
    assert relative_error(ours(edit_image=random_image(100, 70, seed=9), **call), expected) > 1e-2
    assert relative_error(ours(edit_image=[image], **call), expected) > 1e-3  # another text and size
    assert relative_error(ours(**call), expected) > 1e-2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_lists_of_images(plain, clean, count, zero_cond_t) -> None:
    ours, parts = clean if zero_cond_t else plain
    oracle = oracle_of(QwenImageEditPlusPipeline, parts)
    start = {"latents": packed(noise(7)), "output_type": "latent", "true_cfg_scale": 4.0}
    expected = unpacked(oracle(image=images(count), **PROMPTS, **start, **STEPS).images)
    call = {"seed": 7, "output_type": "latents", "guidance": "token_norm", **PROMPTS, **STEPS}
    latents = ours(edit_image=images(count), zero_cond_t=zero_cond_t, **call)
    assert relative_error(latents, expected) < TOLERANCE
    assert relative_error(ours(edit_image=images(count), zero_cond_t=not zero_cond_t, **call), expected) > 1e-3


def test_prompts_of_different_lengths_with_images(plain) -> None:
    ours, _ = plain
    prompts, call = ["a", "make it red and blue"], {"edit_image": images(2), "output_type": "latents", **STEPS}
    batch = ours(prompts, seed=[1, 2], cfg_scale=1, **call)
    singles = [ours(prompt, seed=seed, cfg_scale=1, **call) for prompt, seed in zip(prompts, (1, 2), strict=True)]
    assert relative_error(batch, torch.cat(singles)) < TOLERANCE


def test_every_argument_changes_the_result(plain) -> None:
    ours, _ = plain
    call = {"prompt": "a", "edit_image": images(1)[0], "seed": 1, "output_type": "latents", "cfg_scale": 1, **STEPS}
    base = ours(**call)
    for argument in ("edit_rope_interpolation", "zero_cond_t"):
        assert not torch.allclose(ours(**call, **{argument: True}), base)
        assert torch.equal(ours(**call, **{argument: False}), base)
    assert not torch.allclose(ours(**call, edit_image_auto_resize=False), base)
    square = call | {"edit_image": random_image(SIZE["width"], SIZE["height"]), "edit_image_auto_resize": False}
    assert torch.equal(ours(**square, edit_rope_interpolation=True), ours(**square))  # of the size of the result


def test_a_call_is_planned_with_its_images(plain) -> None:
    """The plan of a limit has another tokenizer, and more tokens for more images."""
    ours, _ = plain
    call = {"device": "cuda", "vram_limit": 8, **STEPS}
    none, two = (ours.plan(**call, edit_image=given) for given in (None, images(2)))
    assert [stage.name for stage in two.stages] == ["encode_prompt", "encode_edit_images", "denoise", "decode_image"]
    assert two.stages[2].activations > none.stages[1].activations
    with pytest.raises(NotEnoughMemory, match="is too small for denoise.* fewer or smaller images, .* take less"):
        ours.plan(**call | {"vram_limit": none.smallest_vram / 2**30}, edit_image=images(2))


def test_sizes_of_the_reference() -> None:
    """Sides of about the area, rounded to multiples of 32, up or down."""
    assert edit.resized_size(1024, 1024, 1024**2) == (1024, 1024)
    assert edit.resized_size(1328, 1024, 1024**2) == (1152, 896)
    assert edit.resized_size(300, 9, 384**2) == (2208, 64)


def test_texts_are_those_of_training(plain) -> None:
    """The segments around the images are the published template; the token ids are those of the whole text."""
    _, parts = plain
    tokenizer, image = parts["tokenizer"], "<|vision_start|><|image_pad|><|vision_end|>"
    for kind, given in ((QwenImageEditPipeline, images(1)[0]), (QwenImageEditPlusPipeline, images(2))):
        template = kind(**parts, processor=OracleProcessor(tokenizer)).prompt_template_encode
        captions = f"Picture 1: {image}Picture 2: {image}" if isinstance(given, list) else ""
        whole = template.format(f"{captions}a hat")
        found = edit.prepare_prompt_images.function(image_processor(), edit_image=given)
        assert "<|image_pad|>".join(segments(found)) + f"a hat{ANSWER}" == whole
        tokens = tokenize(tokenizer, [WeightedText("a hat")], found)
        expanded = "".join(
            part + "<|image_pad|>" * count
            for part, count in zip(whole.split("<|image_pad|>"), (*found.counts, 0), strict=True)
        )
        ids = tokenizer(expanded, return_tensors="pt")["input_ids"]
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert torch.equal(tokens.image_mask, ids == pad)
        assert torch.equal(tokens.input_ids, ids.masked_fill(ids == pad, 0))
        assert tokens.dropped == counted_prefix(tokenizer, template.replace(image, ""))


@pytest.mark.parametrize("listed", [False, True], ids=["one", "list"])
def test_inputs_equal_those_of_the_processor_with_torchvision(plain, listed) -> None:
    """The same token ids and grids; torchvision scales levels with other rounding: by up to two of 255, most by none.

    Measured for images of 1024 x 1024 pixels: 1.9 levels at most, 1e-4 in the mean of the normalised values.
    """
    pytest.importorskip("torchvision", reason="transformers' processor of Qwen2.5-VL needs torchvision")
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer, given = plain[1]["tokenizer"], images(2) if listed else images(1)[0]
    found = edit.prepare_prompt_images.function(image_processor(), edit_image=given)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**IMAGE_PIXELS),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
    )
    sizes = [edit.resized_size(*image.size, edit.LISTED_AREA if listed else edit.AREA) for image in images(1 + listed)]
    scaled = [image.resize(size, Image.Resampling.LANCZOS) for image, size in zip(images(2), sizes, strict=False)]
    text = "<|image_pad|>".join(segments(found)) + f"a hat{ANSWER}"
    expected = processor(text=[text], images=scaled, padding=True, return_tensors="pt")
    tokens = tokenize(tokenizer, [WeightedText("a hat")], found)
    assert torch.equal(tokens.image_mask, expected["mm_token_type_ids"] == 1)
    assert torch.equal(tokens.input_ids, expected["input_ids"].masked_fill(tokens.image_mask, 0))
    assert torch.equal(tokens.mask, expected["attention_mask"])
    assert [(1, *grid) for grid in found.grids] == [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
    difference = (found.patches - expected["pixel_values"]).abs() * 255 * min(processor.image_processor.image_std)
    assert difference.max() < 2.1
    assert difference.mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"edit_image": random_image(12, 40), "edit_image_auto_resize": False},
            "of 12x40 pixels; expected at least 16",
        ),
        (
            {"edit_image": Image.new("RGB", (16, 6000)), "edit_image_auto_resize": False},
            "of 16x6000 pixels; expected a",
        ),
        ({"edit_image": [random_image(40, 40), None]}, "entry 1, None, is NoneType"),
        ({"edit_image": []}, "it is empty"),
    ],
)
def test_images_that_do_not_fit_are_refused(plain, arguments, message) -> None:
    """Before anything runs."""
    with pytest.raises((TypeError, ValueError), match=message):
        plain[0].check(prompt="a", **arguments)


def test_a_long_image_is_refused_by_its_resized_sides(plain, monkeypatch) -> None:
    monkeypatch.setattr(edit, "AREA", 1024 * 1024)
    with pytest.raises(ValueError, match="of 7000x16 pixels; expected a longer side of at most 200 times the shorter"):
        plain[0].check(prompt="a", edit_image=Image.new("RGB", (7000, 16)))
    plain[0].check(prompt="a", edit_image=[Image.new("RGB", (7000, 16))])  # becomes less narrow


def test_what_an_edit_needs(plain) -> None:
    """The processor is named with its argument of `from_pretrained`."""
    ours, _ = plain
    without = type(ours)(ours.components | {"processor": None}, device="cpu", torch_dtype=torch.float32)
    remedy = r"pass processor_config=ModelConfig.from_source\('Qwen/Qwen-Image-Edit:processor/'\) to from_pretrained"
    with pytest.raises(MissingComponent, match=f"'edit_image' needs processor, which is not loaded; {remedy}"):
        without.check(prompt="a", edit_image=images(1)[0])
    without = type(ours)(ours.components | {"dit": None}, device="cpu", torch_dtype=torch.float32)
    with pytest.raises(MissingComponent, match="the denoising loop needs dit, which is not loaded; add its file to mo"):
        without.check(prompt="a", edit_image=images(1)[0])
