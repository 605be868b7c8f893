"""The model in the wheel, and the first command of the README."""

import json
from importlib.resources import files

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffsynth
from diffsynth.cli.group import program

NANO = files("diffsynth_zimage") / "nano"


@pytest.fixture(scope="module")
def pipe():
    # In fp32, because many CPUs convolve bf16 slowly; the command below runs the model's own dtype.
    return diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)


def test_it_is_there_and_small():
    record = diffsynth.registry.get("z-image-nano")
    assert record.weights == "present"
    weights = [NANO / f"{name}.safetensors" for name in ("dit", "text_encoder", "vae")]
    size = sum(file.stat().st_size for file in (*weights, *(NANO / "tokenizer").iterdir()))
    assert size <= 16_000_000


def test_generate_writes_an_image_with_its_provenance(tmp_path):
    out = tmp_path / "apple.png"
    result = CliRunner().invoke(program, ["generate", "z-image-nano", "a red apple", "-o", str(out), "--seed", "0"])
    assert result.exit_code == 0, result.output
    assert Image.open(out).size == (128, 128)
    shown = CliRunner().invoke(program, ["info", str(out), "--json"])
    record = json.loads(shown.output)
    assert (record["model"], record["prompt"], record["seed"]) == ("z-image-nano", "a red apple", 0)
    assert set(record["weights"]) == {"dit", "text_encoder", "vae", "tokenizer"}
    assert all(identity.startswith("sampled-sha256:") for identity in record["weights"]["dit"].values())


def test_a_seed_gives_the_same_image(pipe):
    first, again, other = (pipe("a red apple", seed=seed, output_type="tensor") for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_words_decide_the_colour(pipe):
    red, green = (
        pipe(f"{colour} apple", seed=0, output_type="tensor")[0, :, 40:88, 40:88].mean((1, 2))
        for colour in ("red", "green")
    )
    assert red.argmax() == 0
    assert green.argmax() == 1


def test_guidance_and_images_to_start_from_change_the_image(pipe):
    base = pipe("a red apple", seed=0, output_type="tensor")
    guided = pipe("a red apple", seed=0, cfg_scale=3.0, negative_prompt="green apple", output_type="tensor")
    started = pipe(
        "a red apple",
        seed=0,
        input_image=Image.new("RGB", (64, 64), "blue"),
        denoising_strength=0.5,
        output_type="tensor",
    )
    assert not torch.equal(base, guided)
    assert not torch.equal(base, started)


def test_several_images_at_once(pipe):
    images = pipe(["a red apple", "dog face"], num_images=2, seed=0, num_inference_steps=2)
    assert len(images) == 4
    assert all(image.size == (128, 128) for image in images)
