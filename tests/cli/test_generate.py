import dataclasses
import json

import pytest
import torch
from PIL import Image

import diffsynth
from diffsynth import Pipeline, provenance, registry
from diffsynth.cli.output import POLICIES
from diffsynth.core.data.media import VideoData
from diffsynth.core.data.media_writer import save_video
from diffsynth.core.vram import TransferReport
from diffsynth.core.vram.policy import AUTO, PRESETS
from image_pipeline import VideoPipeline, image_pipeline


@pytest.fixture
def loaded(monkeypatch, installed):
    """Replace `diffsynth.load`; return the list of its calls."""
    calls = []

    def load(name, **options):
        calls.append((name, options))
        return image_pipeline()

    monkeypatch.setattr(diffsynth, "load", load)
    return calls


def test_an_image_with_its_record(run, loaded, tmp_path):
    result = run("generate", "toy-1", "abcde", "-o", "out.png", "--seed", 5, "--steps", 2, "--width", 48)
    assert (result.exit_code, result.stdout) == (0, "out.png\n"), result.output
    image = Image.open(tmp_path / "out.png")
    assert image.size == (48, 16)
    assert abs(image.getpixel((0, 0)) - 128) <= 1  # five letters are half a grey
    made_by = provenance.read_png("out.png")
    assert (made_by["prompt"], made_by["seed"], made_by["num_inference_steps"]) == ("abcde", 5, 2)
    assert made_by["arguments"] == {"width": 48}
    assert loaded == [("toy-1", {"device": None})]
    assert json.loads(run("info", "out.png", "--json").stdout) == made_by


def test_options_reach_the_pipeline(run, loaded):
    options = ("--cfg-scale", 2, "--negative-prompt", "ab", "--device", "cpu", "--dtype", "float32")
    assert run("generate", "toy-1", "abcde", "-o", "out.png", *options).exit_code == 0
    assert provenance.read_png("out.png")["arguments"] == {"cfg_scale": 2.0, "negative_prompt": "ab"}
    assert loaded == [("toy-1", {"device": "cpu", "torch_dtype": torch.float32})]


def test_a_seed_is_drawn_and_recorded(run, loaded):
    seeds = set()
    for _ in range(2):
        assert run("generate", "toy-1", "abc", "-o", "out.png").exit_code == 0
        seeds.add(provenance.read_png("out.png")["seed"])
    assert len(seeds) == 2
    assert all(isinstance(seed, int) for seed in seeds)


def test_several_images_have_numbers_and_their_own_seeds(run, loaded):
    result = run("generate", "toy-1", "abc", "-o", "out.png", "--num-images", 2, "--seed", 5)
    assert result.stdout == "out-1.png\nout-2.png\n"
    records = [provenance.read_png(f"out-{i}.png") for i in (1, 2)]
    assert [made_by["seed"] for made_by in records] == [5, 6]
    assert all(made_by["arguments"] == {} for made_by in records)


def test_set_takes_literals_text_and_images(run, loaded, tmp_path):
    Image.new("L", (16, 32), 200).save(tmp_path / "in.png")
    settings = ("--set", "input_image=in.png", "--set", "denoising_strength=0.5", "--set", "rand_device=cpu")
    assert run("generate", "toy-1", "abc", "-o", "out.png", *settings).exit_code == 0
    assert Image.open(tmp_path / "out.png").getpixel((0, 0)) == 200
    made_by = provenance.read_png("out.png")
    assert made_by["arguments"] == {"denoising_strength": 0.5}
    assert made_by["not_recorded"] == ["input_image"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.jpg"], "toy-1 generates images: expected a name that ends in .png"),
        (["--fps", "8"], "toy-1 generates images, which have no frame rate"),
        (["-o", "no/where/out.png"], "there is no folder"),
        (["--set", "heigth=5"], "unknown argument 'heigth'; did you mean 'height'?"),
        (["--set", "height"], "expected NAME=VALUE"),
        (["--set", "height=32", "--height", "16"], "height is set twice"),
        (["--set", "input_image=missing.png"], "cannot be opened as an image"),
        (["--set", "output_type=latents"], "this command writes images"),
        (["--height", "0"], "height=0: expected a positive integer"),
        (["--steps", "0"], "num_inference_steps=0: expected an integer of at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, loaded, arguments, message, tmp_path):
    result = run("generate", "toy-1", "abc", "-o", "out.png", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.glob("*.png")) == []


def test_an_unknown_model_is_told_before_anything_is_loaded(run, loaded):
    result = run("generate", "toy-2", "abc", "-o", "out.png")
    assert result.exit_code == 2
    assert "did you mean 'toy-1'?" in result.stderr
    assert loaded == []


def test_a_fault_of_ours_keeps_its_traceback(run, loaded, monkeypatch):
    monkeypatch.setattr(diffsynth, "load", lambda *_, **__: 1 / 0)
    assert isinstance(run("generate", "toy-1", "abc", "-o", "out.png").exception, ZeroDivisionError)


@pytest.fixture
def filming(installed, monkeypatch):
    installed(task="text-to-video", pipeline="VideoPipeline")
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: image_pipeline(VideoPipeline))


def test_a_video_with_its_record(run, filming):
    result = run("generate", "toy-1", "abc", "-o", "out.mp4", "--seed", 5, "--width", 48, "--fps", 8)
    assert (result.exit_code, result.stdout) == (0, "out.mp4\n"), result.output
    video = VideoData("out.mp4")
    assert (len(video), video.frame_rate, video[0].size) == (3, 8, (48, 16))
    assert [round(frame.getpixel((0, 0))[0], -1) for frame in video] == [200, 150, 100]
    made_by = json.loads(run("info", "out.mp4", "--json").stdout)
    assert (made_by["prompt"], made_by["seed"], made_by["arguments"]) == ("abc", 5, {"width": 48})


def test_a_video_has_fifteen_frames_per_second_unless_told(run, filming):
    assert run("generate", "toy-1", "abc", "-o", "out.mp4").exit_code == 0
    assert VideoData("out.mp4").frame_rate == 15


def test_a_video_has_the_frame_rate_of_its_model_unless_told(run, filming, monkeypatch):
    record = dataclasses.replace(registry.get("toy-1"), fps=24)
    monkeypatch.setattr(registry, "get", lambda name: record)
    assert run("generate", "toy-1", "abc", "-o", "out.mp4").exit_code == 0
    assert run("generate", "toy-1", "abc", "-o", "told.mp4", "--fps", 8).exit_code == 0
    assert [VideoData(name).frame_rate for name in ("out.mp4", "told.mp4")] == [24, 8]


def test_several_videos_have_numbers(run, filming):
    result = run("generate", "toy-1", "abc", "-o", "out.mp4", "--num-images", 2, "--seed", 5)
    assert result.stdout == "out-1.mp4\nout-2.mp4\n"
    assert [provenance.read_video(f"out-{i}.mp4")["seed"] for i in (1, 2)] == [5, 6]


def test_a_clip_is_opened_as_one(run, filming):
    save_video([Image.new("RGB", (16, 32), (level,) * 3) for level in (10, 90, 170, 250)], "in.mp4", fps=8)
    result = run("generate", "toy-1", "abc", "-o", "out.mp4", "--set", "input_image=in.mp4")
    assert result.exit_code == 0, result.output
    assert [round(frame.getpixel((8, 8))[0], -1) for frame in VideoData("out.mp4")] == [10, 90, 170]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.png"], "toy-1 generates a video: expected a name that ends in .mp4"),
        (["-o", "out.mp4", "--fps", "0"], "--fps 0: expected a positive number"),
        (["-o", "out.mp4", "--set", "input_image=missing.mp4"], "missing.mp4 does not exist"),
    ],
)
def test_bad_input_of_a_video(run, filming, arguments, message, tmp_path):
    result = run("generate", "toy-1", "abc", *arguments)
    assert result.exit_code != 0
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory_options_reach_the_loading_and_the_report_is_printed(run, loaded, monkeypatch):
    report = TransferReport(bytes_moved=2 * 10**9, seconds_copying=1.0, hits=3)
    monkeypatch.setattr(Pipeline, "transfers", {"dit": report})
    result = run("generate", "toy-1", "abc", "-o", "out.png", "--vram", "8.5", "--policy", "fp8", "-v")
    assert result.exit_code == 0, result.output
    assert loaded == [("toy-1", {"device": None, "vram_limit": 8.5, "policy": "fp8"})]
    assert "dit: 2.00 GB moved at 2.0 GB/s, 100% of it hidden" in result.stderr
    assert result.stdout == "out.png\n"
    assert "GB moved" not in run("generate", "toy-1", "abc", "-o", "out.png").stderr


def test_the_policies_are_the_presets():
    assert (*PRESETS, AUTO) == POLICIES
