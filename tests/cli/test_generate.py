import dataclasses
import gzip
import json
import re
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffsynth
from diffsynth import Pipeline, provenance, registry
from diffsynth._discovery import Declared
from diffsynth.cli import main
from diffsynth.cli.output import POLICIES
from diffsynth.core.data.media import VideoData, open_media
from diffsynth.core.data.media_writer import save_video
from diffsynth.core.loader.identity import file_identity
from diffsynth.core.vram import TransferReport
from diffsynth.core.vram.policy import AUTO, PRESETS
from diffsynth.models.plugin import WRITERS
from diffsynth.spec import WriterSpec
from image_pipeline import LayersPipeline, VideoPipeline, image_pipeline
from label_pipeline import LabelPipeline, MappingPipeline, SoundPipeline, label_pipeline


@pytest.fixture
def loaded(monkeypatch, installed):
    """Replace `diffsynth.load`; return the list of its calls."""
    calls = []

    def load(name, on_progress=None, **options):
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
    assert provenance.read_png("out.png")["arguments"] == {"negative_prompt": "ab"}
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


def test_each_of_several_images_of_a_result_has_its_file(run, installed, monkeypatch):
    """Such as the layers of one; the record says which of them it is."""
    installed(pipeline="LayersPipeline")
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: image_pipeline(LayersPipeline))
    result = run("generate", "toy-1", "abc", "-o", "out.png", "--seed", 5)
    assert result.stdout == "out-1.png\nout-2.png\nout-3.png\n", result.output
    assert [Image.open(f"out-{i}.png").getpixel((0, 0))[0] for i in (1, 2, 3)] == [200, 150, 100]
    records = [provenance.read_png(f"out-{i}.png") for i in (1, 2, 3)]
    assert [(made_by["seed"], made_by["image"]) for made_by in records] == [(5, 1), (5, 2), (5, 3)]
    result = run("generate", "toy-1", "abc", "-o", "two.png", "--seed", 5, "--num-images", 2)
    assert result.stdout.split() == [f"two-{i}-{j}.png" for i in (1, 2) for j in (1, 2, 3)]
    made_by = provenance.read_png("two-2-3.png")
    assert (made_by["seed"], made_by["image"]) == (6, 3)
    assert run("generate", "toy-1", "abc", "-o", "out.safetensors").stdout == "out.safetensors\n"
    assert load_file("out.safetensors")["images"].shape[0] == 3


def test_set_takes_literals_text_and_images(run, loaded, tmp_path):
    Image.new("L", (16, 32), 200).save(tmp_path / "in.png")
    settings = ("--set", "input_image=in.png", "--set", "denoising_strength=0.5", "--set", "rand_device=cpu")
    assert run("generate", "toy-1", "abc", "-o", "out.png", *settings).exit_code == 0
    assert Image.open(tmp_path / "out.png").getpixel((0, 0)) == 200
    made_by = provenance.read_png("out.png")
    assert made_by["arguments"] == {"denoising_strength": 0.5}
    assert made_by["not_recorded"] == []
    found = {"value": "in.png", "files": {"in.png": file_identity(Path("in.png"))}}
    assert made_by["inputs"] == {"input_image": found}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.bmp"], "'out.bmp' ends in '.bmp', which no writer has"),
        (
            ["-o", "out"],
            "'out' ends in no suffix, which no writer has. Expected one of .gif (video), .jpeg (image)",
        ),
        (
            ["-o", "out.wav"],
            "'out.wav': toy-1 returns image, and .wav is for audio; expected a name that ends in .jpeg or",
        ),
        (["--fps", "8"], "--fps 8 is for video, and .png is for image; leave it out"),
        (["-o", "no/where/out.png"], "there is no folder"),
        (["--set", "heigth=5"], "unknown argument 'heigth'; did you mean 'height'?"),
        (["--set", "height"], "expected NAME=VALUE"),
        (["--set", "height=32", "--height", "16"], "height is set twice"),
        (["--set", "input_image=missing.png"], "cannot be opened as an image"),
        (["--set", "seed=x"], "--set seed='x': expected an integer or a list of an integer or null"),
        (
            ["--set", "output_type=latents"],
            "--set output_type=latents: .png files (image) hold the output_type pil; write tensors to out.safetensors",
        ),
        (["--height", "0"], "height=0: expected an integer, at least 1"),
        (["--steps", "0"], "num_inference_steps=0: expected an integer, at least 1 and at most 10000"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, loaded, arguments, message, tmp_path):
    result = run("generate", "toy-1", "abc", "-o", "out.png", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.glob("*.png")) == []


def test_an_output_that_cannot_be_written_is_told_before_anything_is_loaded(run, loaded, tmp_path):
    (tmp_path / "a.png").mkdir()
    for out, message in {"a.png": "it is a folder", f"{'n' * 300}.png": "File name too long"}.items():
        result = run("generate", "toy-1", "abc", "-o", out)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert loaded == []


def test_numbered_outputs_are_tried_before_anything_is_loaded(run, loaded, tmp_path):
    (tmp_path / "a-2.png").mkdir()
    (tmp_path / "b-1.png").touch(mode=0o400)
    for out, message in {"a.png": "a-2.png cannot be written: it is a folder", "b.png": "b-1.png .*read-only"}.items():
        result = run("generate", "toy-1", "abc", "-o", out, "--num-images", "2")
        assert result.exit_code == 2
        assert re.search(message, result.stderr)
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "a-1.png").exists()


def test_an_option_by_the_name_of_its_argument(run, loaded):
    for option, meant in {
        "--num_inference_steps": "--steps",
        "--num-inference-steps": "--steps",
        "--num_images": "--num-images",
        "--heigth": "--height",
        "--denoising_strength": "--set denoising_strength=VALUE",
    }.items():
        result = run("generate", "toy-1", "abc", "-o", "out.png", option, "1")
        assert result.exit_code == 2
        assert f"Did you mean '{meant}'?" in result.stderr, option


def test_an_output_that_fails_is_one_line(run, loaded, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffsynth.runtime.builtin_writers.write_image", full)
    result = run("generate", "toy-1", "abc", "-o", "out.png")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_closed_stream_ends_no_call(installed, loaded, monkeypatch, tmp_path, closed):
    """Standard output was closed, and the command ended with a traceback after the image was written."""
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "toy-1", "abc", "-o", "out.png"])
    assert ended.value.code == 0
    assert Image.open(tmp_path / "out.png").size


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


def test_animations_and_folders_of_frames(run, filming):
    assert run("generate", "toy-1", "abc", "-o", "new/", "--num-images", 2, "--seed", 5).stdout == "new-1\nnew-2\n"
    assert [provenance.read(f"new-{index}")["seed"] for index in (1, 2)] == [5, 6]
    for name, frames in {"a.gif": 3, "a.webp": 3, "frames/": 3}.items():
        result = run("generate", "toy-1", "abc", "-o", name, "--seed", 5)
        assert result.exit_code == 0, result.output
        assert len(open_media(name)) == frames
        assert provenance.read(name)["seed"] == 5
    result = run("generate", "toy-1", "abc", "-o", "frames")
    assert "frames cannot be written: the folder is not empty. Name a new one, or empty it" in result.stderr
    assert "--fps 8 is for video" not in run("generate", "toy-1", "abc", "-o", "b.webp", "--fps", 8).stderr


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
        (["-o", "out.png"], "toy-1 returns video, and .png is for image; expected a name that ends in .gif or .mp4"),
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


def test_the_prompt_may_be_left_out(run, loaded):
    result = run("generate", "toy-1", "-o", "out.png", "--seed", 5)
    assert result.exit_code == 0, result.output
    made_by = provenance.read_png("out.png")
    assert (made_by["prompt"], made_by["seed"], made_by["arguments"]) == ("", 5, {})
    assert Image.open("out.png").getpixel((0, 0)) == image_pipeline()(seed=5).getpixel((0, 0))


def test_images_and_latents_as_tensors(run, loaded):
    line = ("generate", "toy-1", "abcde", "-o", "out.safetensors", "--seed", 5)
    assert run(*line).exit_code == 0
    pixels = load_file("out.safetensors")["image"]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (16, 32, 1))
    assert torch.equal(pixels, torch.from_numpy(np.array(image_pipeline()("abcde", seed=5)))[..., None])
    result = run(*line, "--set", "output_type=latents", "--num-images", 2)
    assert result.stdout == "out-1.safetensors\nout-2.safetensors\n"
    latents = image_pipeline()("abcde", seed=5, num_images=2, output_type="latents")
    for index, name in enumerate(("out-1.safetensors", "out-2.safetensors")):
        assert torch.equal(load_file(name)["output"], latents[index])
        assert provenance.read(name)["seed"] == 5 + index
        assert provenance.read(name)["arguments"] == {"output_type": "latents"}


@pytest.fixture
def labelled(installed, monkeypatch):
    """Return a function that installs a pipeline without a prompt as `toy-1` and returns the list of its loads."""

    def install(kind=LabelPipeline, *, extra=(), **facts):
        declared = [*(Declared(one, "core", "diffsynth-core", "0.1.0") for one in WRITERS), *extra]
        facts = {"task": "label-to-something", "writers": tuple(declared), **facts}
        installed(pipeline=f"label_pipeline:{kind.__name__}", **facts)
        calls = []
        monkeypatch.setattr(diffsynth, "load", lambda *_, **__: (calls.append(1), label_pipeline(kind))[1])
        return calls

    return install


def test_a_model_without_a_prompt_writes_tensors(run, labelled):
    labelled()
    settings = ("--set", "label=3", "--set", "num_samples=9", "--seed", 5)
    result = run("generate", "toy-1", "-o", "out.safetensors", *settings)
    assert (result.exit_code, result.stdout) == (0, "out.safetensors\n"), result.output
    tensor = load_file("out.safetensors")["output"]
    assert torch.equal(tensor, label_pipeline()(label=3, num_samples=9, seed=5))
    assert (tensor - 0.3).abs().max() < 1e-6
    made_by = json.loads(run("info", "out.safetensors", "--json").stdout)
    assert made_by == provenance.record(label_pipeline(), {"label": 3, "num_samples": 9, "seed": 5})
    assert (made_by["seed"], made_by["arguments"]) == (5, {"label": 3, "num_samples": 9})
    assert "prompt" not in made_by


def sound(path):
    """Return (rate, int16 samples `n c`) of a wave file, read without PyAV."""
    with wave.open(path) as file:
        levels = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return file.getframerate(), levels.reshape(-1, file.getnchannels())


def test_a_model_of_sound_writes_waves(run, labelled):
    labelled(SoundPipeline)
    result = run("generate", "toy-1", "-o", "out.wav", "--set", "label=3", "--num-images", 2, "--seed", 5)
    assert (result.exit_code, result.stdout) == (0, "out-1.wav\nout-2.wav\n"), result.output
    expected = label_pipeline(SoundPipeline)(label=3, seed=5, num_images=2)
    for index in (0, 1):
        rate, levels = sound(f"out-{index + 1}.wav")
        assert rate == 8000
        assert np.array_equal(levels.T, (expected[index].samples * 32768).round().numpy())
        assert abs(int(levels[0, 0]) - 0.3 * 32768) <= 1
        made_by = json.loads(run("info", f"out-{index + 1}.wav", "--json").stdout)
        assert (made_by["seed"], made_by["arguments"]) == (5 + index, {"label": 3})


def test_a_tensor_is_sound_at_a_given_rate(run, labelled):
    labelled()
    line = ("generate", "toy-1", "-o", "out.wav", "--set", "label=5")
    assert run(*line, "--sample-rate", 16000).exit_code == 0
    rate, levels = sound("out.wav")
    assert (rate, levels.shape) == (16000, (6, 2))
    result = run(*line)
    assert result.exit_code == 2
    assert "the output, a tensor of shape (2, 6), states no sample rate" in result.stderr


def test_a_result_of_each_label_has_its_own_record(run, labelled):
    labelled()
    settings = ("--set", "label=[3, 7]", "--num-images", 2, "--seed", 5)
    result = run("generate", "toy-1", "-o", "out.safetensors", *settings)
    assert result.exit_code == 0, result.output
    for index, label in enumerate((3, 3, 7, 7)):
        made_by = provenance.read(f"out-{index + 1}.safetensors")
        assert (made_by["seed"], made_by["arguments"]) == (5 + index, {"label": label})
        expected = label_pipeline()(seed=made_by["seed"], **made_by["arguments"])
        assert torch.equal(load_file(f"out-{index + 1}.safetensors")["output"], expected)


def test_results_that_cannot_be_separated_are_in_one_file(run, labelled):
    labelled(MappingPipeline)
    line = ("generate", "toy-1", "-o", "out.safetensors", "--set", "label=3", "--num-images", 2, "--seed", 5)
    assert run(*line).stdout == "out.safetensors\n"
    assert load_file("out.safetensors")["values"].shape == (2, 2, 6)
    made_by = provenance.read("out.safetensors")
    assert (made_by["seed"], made_by["arguments"]) == (5, {"label": 3, "num_images": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red", "-o", "out.wav"], "PROMPT is 'red', and toy-1 takes no prompt; leave it out. It takes, by --set"),
        (["-o", "out.wv"], "'out.wv' ends in '.wv', which no writer has; did you mean '.wav'?"),
        (["-o", "out.png"], "toy-1 returns audio, and .png is for image; expected a name that ends in .safetensors or"),
        (["-o", "out.wav", "--set", "lable=3"], "unknown argument 'lable'; did you mean 'label'?"),
        (
            ["-o", "out.wav", "--set", "label=three"],
            "label='three': expected an integer, at least 0 and at most 9 or a list",
        ),
        (["-o", "out.wav", "--set", "label=10"], "label=10: expected an integer, at least 0 and at most 9 or a list"),
        (["-o", "out.wav", "--set", "prompt=red"], "unknown argument 'prompt'"),
        (["-o", "out.wav", "--height", "8"], "unknown argument 'height'"),
        (["-o", "out.wav", "--fps", "8"], "--fps 8 is for video, and .wav is for audio"),
        (["-o", "out.wav", "--sample-rate", "0"], "--sample-rate 0: expected a positive number"),
        (["-o", "out.wav", "--sample-rate", "9"], "sample_rate=9, and the output has 8000"),
    ],
)
def test_bad_input_of_a_model_without_a_prompt(run, labelled, arguments, message, tmp_path):
    calls = labelled(SoundPipeline)
    result = run("generate", "toy-1", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert calls == [1] * message.startswith("sample_rate=9")


def test_a_result_that_does_not_fit_a_suffix_can_be_made_again(run, labelled, tmp_path):
    labelled()
    result = run("generate", "toy-1", "-o", "out.png", "--seed", 5)
    assert result.exit_code == 2
    assert "out.png cannot be written as image: the output is a tensor of shape (2, 6)" in result.stderr
    assert result.stderr.endswith("Tensors can be written with -o NAME.safetensors --seed 5\n")
    assert list(tmp_path.iterdir()) == []


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_a_writer_of_a_plugin(run, labelled, tmp_path):
    spec = WriterSpec(suffix=".lines.gz", kind="lines", writer="label_pipeline:write_lines", description="JSON lines")
    labelled(extra=[Declared(spec, "toy", "diffsynth-toy", "1.2")])
    result = run("generate", "toy-1", "-o", "out.lines.gz", "--num-images", 2, "--seed", 5, "--set", "label=2")
    assert result.stdout == "out-1.lines.gz\nout-2.lines.gz\n", result.output
    (made_by, settings), *rows = lines(tmp_path / "out-2.lines.gz")
    assert (made_by["seed"], made_by["arguments"], settings) == (6, {"label": 2}, {})
    assert np.allclose(rows, 0.2)
    assert ".lines.gz" in run("generate", "--help").stdout
    assert "lines: JSON lines" in run("generate", "--help").stdout


def test_a_broken_writer_is_told_before_anything_is_loaded(run, labelled):
    spec = WriterSpec(suffix=".lines", kind="lines", writer="label_pipeline:write_line")
    calls = labelled(extra=[Declared(spec, "toy", "diffsynth-toy", "1.2")])
    result = run("generate", "toy-1", "-o", "out.lines")
    assert (result.exit_code, calls) == (2, [])
    assert "writer '.lines' of plugin toy (diffsynth-toy 1.2) cannot be loaded: ImportError: reference" in result.stderr
