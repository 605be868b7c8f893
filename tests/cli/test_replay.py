import importlib.metadata
import json

import pytest
import torch
from PIL import Image

import diffsynth
from diffsynth import provenance
from diffsynth.core.lora import save_lora
from image_pipeline import LayersPipeline, VideoPipeline, image_pipeline
from lora_files import random_lora

CALL = ("--seed", 5, "--steps", 1, "--device", "cpu", "--dtype", "float32", "--set", "height=32", "--set", "width=32")


@pytest.fixture
def nano(monkeypatch, tmp_path):
    """Work in a new folder, with the model of the wheel; return a function that runs a command."""
    from click.testing import CliRunner

    from diffsynth.cli.group import program

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(program, [str(argument) for argument in arguments])


def changed(file, **values):
    """Write another record into a PNG file."""
    provenance.save_png(Image.open(file), file, provenance.read(file) | values)


def test_it_is_equal_to_the_bit_with_lora_and_input(nano, tmp_path):
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)
    save_lora(random_lora(pipe.dit, ("to_q",)), tmp_path / "style.safetensors")
    Image.new("RGB", (32, 32), "red").save("in.png")
    inputs = ("--set", "input_image=in.png", "--set", "denoising_strength=0.7", "--lora", "style.safetensors:0.5")
    result = nano("generate", "z-image-nano", "an apple", "-o", "a.png", *CALL, *inputs)
    assert result.exit_code == 0, result.output
    made_by = provenance.read("a.png")
    assert [(lora["alpha"], lora["paths"]) for lora in made_by["loras"]] == [(0.5, ["style.safetensors"])]
    result = nano("replay", "a.png")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert result.stdout == "a-replay.png\nequal: all 3072 levels of 0 to 255 of a.png and a-replay.png\n"
    assert Image.open("a.png").tobytes() == Image.open("a-replay.png").tobytes()
    assert provenance.read("a-replay.png") == made_by
    (tmp_path / "style.safetensors").rename(tmp_path / "gone")
    assert "its LoRA style.safetensors is not there; put it beside a.png" in nano("replay", "a.png").stderr


def test_what_differs_is_said_and_refused_before_anything_is_loaded(nano, monkeypatch):
    assert nano("generate", "z-image-nano", "an apple", "-o", "a.png", *CALL).exit_code == 0
    weights = provenance.read("a.png")["weights"]
    other = {**weights, "dit": {"dit.safetensors": "sha256:0"}}
    quantized = {"dit": {"int8_row": 3}}
    changed("a.png", weights=other, versions={"torch": "1.0"}, plugins={"nothing": "2"}, quantization=quantized)
    with monkeypatch.context() as context:
        context.setattr(diffsynth, "load", lambda *_, **__: 1 / 0)
        result = nano("replay", "a.png")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0] == f"differs: torch is {importlib.metadata.version('torch')}, and was 1.0"
    assert lines[1] == "differs: nothing is not installed, and was 2"
    assert lines[2].startswith("differs: dit: dit.safetensors is sampled-sha256:")
    assert lines[3] == "differs: dit was quantized by int8_row, and is loaded as it is"
    assert "and was sha256:0" in lines[4]
    assert lines[4].endswith("To generate nevertheless: --anyway")
    result = nano("replay", "a.png", "--anyway", "-o", "b.png", "--set", "seed=6")
    assert result.exit_code == 1
    assert result.stdout.startswith("b.png\ndifferent: ")
    assert "PSNR" in result.stdout


@pytest.fixture
def toy(monkeypatch, installed):
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: image_pipeline())


def test_each_of_several_results_and_their_grid(run, toy):
    """The whole call is made again, because a batch may differ from its results alone in the last bits."""
    run("generate", "toy-1", "abc", "-o", "a.png", "--num-images", 3, "--seed", 5, "--grid", "auto")
    made_by = provenance.read("a-2.png")
    assert (made_by["seed"], made_by["result"], made_by["call"]) == (6, 2, {"seed": 5, "num_images": 3})
    for name in ("a-2", "a-grid"):
        result = run("replay", f"{name}.png")
        assert result.exit_code == 0, result.output
        assert provenance.read(f"{name}-replay.png") == provenance.read(f"{name}.png")
    lists = ("--set", 'prompt=["ab", "abcd"]', "--set", "seed=[7, 3]")
    assert run("generate", "toy-1", "-o", "b.png", *lists).exit_code == 0
    made_by = provenance.read("b-2.png")
    assert (made_by["prompt"], made_by["seed"]) == ("abcd", 3)
    assert made_by["call"] == {"prompt": ["ab", "abcd"], "seed": [7, 3]}
    assert run("replay", "b-2.png").exit_code == 0


def test_each_layer(run, installed, monkeypatch):
    installed(pipeline="LayersPipeline")
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: image_pipeline(LayersPipeline))
    run("generate", "toy-1", "abc", "-o", "a.png", "--seed", 5)
    assert run("replay", "a-3.png", "-o", "b.png").stdout.startswith("b.png\nequal: ")
    assert Image.open("b.png").getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a/", "a.safetensors"])
def test_every_format_of_a_video(run, installed, monkeypatch, name):
    installed(task="text-to-video", pipeline="VideoPipeline")
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: image_pipeline(VideoPipeline))
    fps = () if name in ("a/", "a.safetensors") else ("--fps", 8)
    assert run("generate", "toy-1", "abc", "-o", name, "--seed", 5, *fps).exit_code == 0
    result = run("replay", name)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("a-replay")
    assert provenance.read(name).get("written", {}) == ({"fps": 8} if fps else {})


def test_inputs_are_found_beside_the_file_and_compared(run, toy, tmp_path, monkeypatch):
    Image.new("L", (16, 32), 200).save(tmp_path / "in.png")
    settings = ("--set", "input_image=in.png", "--set", "denoising_strength=0.5")
    assert run("generate", "toy-1", "abc", "-o", "a.png", *settings).exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("replay", tmp_path / "a.png", "-o", "b.png").exit_code == 0
    Image.new("L", (16, 32), 100).save(tmp_path / "other.png")
    (tmp_path / "other.png").replace(tmp_path / "in.png")
    result = run("replay", tmp_path / "a.png", "-o", "b.png")
    assert result.exit_code == 2
    assert "in.png (input_image) is another one" in result.stderr
    assert run("replay", tmp_path / "a.png", "-o", "b.png", "--anyway").stdout.splitlines()[1].startswith("different: ")
    (tmp_path / "in.png").unlink()
    result = run("replay", tmp_path / "a.png", "-o", "b.png")
    assert "the input input_image was in.png, which is not there; give --set input_image=PATH" in result.stderr


def test_records_that_do_not_suffice(run, toy, tmp_path):
    assert run("generate", "toy-1", "abc", "-o", "a.png").exit_code == 0
    for values, message in (
        ({"model": None}, "the record names no model"),
        ({"model": "toy-2"}, "did you mean 'toy-1'?"),
        ({"not_recorded": ["input_image"]}, "the record cannot hold input_image; give --set input_image=VALUE"),
        ({"arguments": {"heigth": 3}}, "unknown argument 'heigth'; did you mean 'height'?"),
        (
            {"loras": [{"role": "dit", "alpha": 1.0, "hot": True, "files": {}, "paths": []}]},
            "its LoRA a LoRA in memory is",
        ),
    ):
        (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
        changed("b.png", **values)
        result = run("replay", "b.png")
        assert result.exit_code == 2
        assert message in result.stderr
    assert json.loads(run("info", "a.png", "--json").stdout)["model"] == "toy-1"
