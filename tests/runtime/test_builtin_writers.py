import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffsynth import provenance
from diffsynth.core.data.audio import Audio
from diffsynth.core.data.media import VideoData, open_media, read_audio
from diffsynth.runtime.builtin_writers import (
    write_audio,
    write_frames,
    write_gif,
    write_image,
    write_jpeg,
    write_tensors,
    write_video,
    write_webp,
)

RED = Image.new("RGB", (16, 8), "red")
MADE_BY = {"seed": 7, "prompt": "苹果"}
SAMPLES = torch.linspace(-1, 0.5, 24).reshape(2, 12)


def test_an_image_has_the_bytes_of_save_png(tmp_path):
    write_image(RED, tmp_path / "a.png", record=MADE_BY)
    provenance.save_png(RED, tmp_path / "b.png", MADE_BY)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_video_has_the_bytes_of_save_video(tmp_path):
    frames = [Image.new("RGB", (16, 8), (level, 0, 0)) for level in (10, 90, 200)]
    write_video(frames, tmp_path / "a.mp4", record=MADE_BY, fps=8)
    provenance.save_video(frames, tmp_path / "b.mp4", MADE_BY, fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert VideoData(tmp_path / "a.mp4").frame_rate == 8


def test_a_video_of_arrays_or_a_tensor(tmp_path):
    array = np.full((8, 16, 3), 200, dtype=np.uint8)
    tensor = torch.full((3, 2, 8, 16), 200 / 127.5 - 1)
    for name, frames in (("array.mp4", [array, array]), ("tensor.mp4", tensor), ("batch.mp4", tensor[None])):
        write_video(frames, tmp_path / name, record=MADE_BY, fps=8)
        assert [round(frame.getpixel((4, 4))[0], -1) for frame in VideoData(tmp_path / name)] == [200, 200]


def test_a_video_of_lower_quality_is_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    for name, quality in (("low.mp4", 30), ("usual.mp4", 90)):
        write_video(list(noise), tmp_path / name, record=MADE_BY, fps=8, quality=quality)
    write_video(list(noise), tmp_path / "default.mp4", record=MADE_BY, fps=8)
    assert (tmp_path / "low.mp4").stat().st_size < (tmp_path / "usual.mp4").stat().st_size / 2
    assert (tmp_path / "default.mp4").read_bytes() == (tmp_path / "usual.mp4").read_bytes()


def test_images_with_a_quality(tmp_path):
    for write, name in ((write_jpeg, "a.jpg"), (write_webp, "a.webp")):
        write(RED, tmp_path / name, record=MADE_BY, quality=100)
        assert np.abs(np.subtract(Image.open(tmp_path / name).getpixel((3, 3)), (255, 0, 0))).max() <= 2
        assert provenance.read(tmp_path / name) == MADE_BY


@pytest.mark.parametrize("form", ["images", "arrays", "tensor"])
def test_frames_as_animations_and_as_a_folder(tmp_path, form):
    levels = [10, 90, 200]
    images = [Image.new("RGB", (16, 8), (level,) * 3) for level in levels]
    arrays = [np.asarray(image) for image in images]
    tensor = torch.from_numpy(np.stack(arrays)).permute(3, 0, 1, 2) / 127.5 - 1
    frames = {"images": images, "arrays": arrays, "tensor": tensor}[form]
    write_gif(frames, tmp_path / "a.gif", record=MADE_BY, fps=8)
    write_webp(frames, tmp_path / "a.webp", record=MADE_BY, fps=8, quality=100)
    write_frames(frames, tmp_path / "a", record=MADE_BY)
    for name in ("a.gif", "a.webp", "a"):
        assert [frame.getpixel((4, 4))[0] for frame in open_media(tmp_path / name)] == levels, name
        assert provenance.read(tmp_path / name) == MADE_BY


@pytest.mark.parametrize(
    ("output", "settings"),
    [
        (Audio(SAMPLES, 8000), {}),
        (Audio(SAMPLES, 8000), {"sample_rate": 8000}),
        (SimpleNamespace(samples=SAMPLES, sample_rate=8000), {}),
        (SAMPLES, {"sample_rate": 8000}),
    ],
)
def test_sound(tmp_path, output, settings):
    write_audio(output, tmp_path / "a.wav", record=MADE_BY, **settings)
    samples, rate = read_audio(tmp_path / "a.wav")
    assert rate == 8000
    assert (samples - SAMPLES).abs().max() <= 0.5 / 32768
    assert provenance.read(tmp_path / "a.wav") == MADE_BY


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (SAMPLES.bfloat16(), {"output": SAMPLES.bfloat16()}),
        ({"a": SAMPLES, "b": SAMPLES.T[::2]}, {"a": SAMPLES, "b": SAMPLES.T[::2]}),
        (Audio(SAMPLES, 8000), {"samples": SAMPLES, "sample_rate": torch.tensor(8000)}),
        (RED, {"image": torch.tensor([255, 0, 0], dtype=torch.uint8).expand(8, 16, 3)}),
        (Image.new("L", (16, 8), 9), {"image": torch.full((8, 16, 1), 9, dtype=torch.uint8)}),
        ([RED, RED], {"images": torch.tensor([255, 0, 0], dtype=torch.uint8).expand(2, 8, 16, 3)}),
    ],
)
def test_tensors(tmp_path, output, expected):
    write_tensors(output, tmp_path / "a.safetensors", record=MADE_BY)
    found = load_file(tmp_path / "a.safetensors")
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["diffsynth"]) == MADE_BY
    assert provenance.read(tmp_path / "a.safetensors") == MADE_BY
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


NO_RATE = "a.wav cannot be written as audio: the output, a tensor of shape (2, 12), states no sample rate. Return an"


@pytest.mark.parametrize(
    ("write", "output", "settings", "message"),
    [
        (write_image, SAMPLES, {}, "as image: the output is a tensor of shape (2, 12); expected a PIL image"),
        (write_image, [RED, RED], {}, "as image: the output is a list of 2 Image; expected a PIL image"),
        (write_video, RED, {"fps": 8}, "as video: the output is an Image; expected a list of frames"),
        (write_video, [], {"fps": 8}, "as video: the output is a list of 0; expected a list of frames"),
        (write_video, "frames", {"fps": 8}, "as video: the output is a str; expected"),
        (write_video, [RED], {"fps": 0}, "as video: fps=0: expected a positive number"),
        (write_video, SAMPLES, {"fps": 8}, "as video: a tensor of torch.float32 and shape (2, 12); expected"),
        (write_audio, RED, {}, "as audio: the output is an Image; expected an object with samples and sample_rate"),
        (write_audio, {"samples": SAMPLES}, {}, "as audio: the output is a dict; expected an object with samples"),
        (write_audio, SAMPLES, {}, NO_RATE),
        (write_audio, Audio(SAMPLES, 8000), {"sample_rate": 9}, "as audio: sample_rate=9, and the output has 8000"),
        (
            write_audio,
            SAMPLES[0],
            {"sample_rate": 8000},
            "as audio: a tensor of torch.float32 and shape (12,); expected",
        ),
        (write_jpeg, SAMPLES, {}, "as image: the output is a tensor of shape (2, 12); expected a PIL image"),
        (write_jpeg, RED.convert("RGBA"), {}, "JPEG cannot hold transparency"),
        (write_webp, [SAMPLES], {}, "as image or video: the output is a list of 1 Tensor; expected a list of frames"),
        (write_gif, RED, {"fps": 8}, "as video: the output is an Image; expected a list of frames"),
        (write_frames, SAMPLES, {}, "as video: a tensor of torch.float32 and shape (2, 12); expected (3, t, h, w)"),
        (write_tensors, {"a": 3}, {}, "as tensors: the output is a dict; expected a tensor, a mapping from names"),
        (write_tensors, {}, {}, "as tensors: the output is an empty mapping"),
        (write_tensors, [SAMPLES], {}, "as tensors: the output is a list of 1 Tensor; expected"),
        (write_tensors, [RED, RED.rotate(90, expand=True)], {}, "as tensors: the output has images of several sizes"),
        (write_tensors, Image.new("F", (8, 8)), {}, "as tensors: an image of mode 'F'; expected one of L, LA, RGB"),
    ],
)
def test_what_a_writer_cannot_write(tmp_path, write, output, settings, message):
    others = {write_video: ".mp4", write_audio: ".wav", write_tensors: ".safetensors", write_frames: ""}
    images = {write_image: ".png", write_jpeg: ".jpg", write_webp: ".webp", write_gif: ".gif"}
    with pytest.raises((TypeError, ValueError)) as caught:
        write(output, tmp_path / f"a{(images | others)[write]}", record={}, **settings)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
