"""Calls that are refused before a network runs."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffsynth
from diffsynth.cli.group import program
from diffsynth.core.data.media_writer import save_video
from diffsynth.errors import MissingComponent
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_wan import WanVideoPipeline
from diffsynth_wan.config import WanDiTConfig

SIZE = {"height": 32, "width": 32, "num_frames": 9}
RED, BLUE = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")


class NeverRuns(torch.nn.Module):
    """A network whose config may be read, and which must not run."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, *given, **named):
        raise AssertionError("a network ran before the arguments were refused")

    encode_pieces = decode_pieces = forward


def pipeline(*, image_encoder=None, dit2=None, vace=None, vace2=None, **config) -> WanVideoPipeline:
    dit = NeverRuns(WanDiTConfig(**config))
    return WanVideoPipeline.from_components(
        dit=dit,
        dit2=dit2 and NeverRuns(dit.config),
        text_encoder=NeverRuns(None),
        vae=NeverRuns(SimpleNamespace(factor=8, time_factor=4)),
        image_encoder=image_encoder,
        vace=vace and NeverRuns(SimpleNamespace()),
        vace2=vace2 and NeverRuns(SimpleNamespace()),
        tokenizer=byte_tokenizer(),
        device="cpu",
        torch_dtype=torch.float32,
    )


TILES = ("tile_size", "tile_stride")
TEXT = {}
IMAGE = {"in_channels": 36}
BOTH_ENDS = {"in_channels": 36, "image_dim": 1280, "image_tokens": 514}
FRAMES = {"in_channels": 48, "out_channels": 48, "frame_times": True}
CONTROL = {"in_channels": 48}
CAMERA = {"in_channels": 32, "camera_channels": 24}
VACE = {"vace": True}
ANIMATE_2 = {"in_channels": 36, "reference_video": True}
DANCE = {"animate2_reference_image": RED, "animate2_reference_video": [RED] * 9}


@pytest.mark.parametrize(
    ("networks", "arguments", "error", "message"),
    [
        (TEXT, {"tiled": "no"}, ValueError, "tiled='no': expected True or False"),
        (TEXT, {"cfg_merge": 1}, ValueError, "cfg_merge=1: expected True or False"),
        (TEXT, {"camera_control_speed": "slow"}, ValueError, "camera_control_speed='slow': expected a number"),
        (
            TEXT,
            {"camera_control_origin": "here"},
            ValueError,
            "camera_control_origin='here': expected a list of a number",
        ),
        (TEXT, {"input_video": [RED] * 5}, ValueError, "input_video has 5 frames.*9.*num_frames=5"),
        (TEXT, {"input_video": []}, ValueError, r"input_video=\[\]: expected a list of a PIL image.*it is empty"),
        (TEXT, {"input_video": [RED] * 8 + [BLUE]}, ValueError, "frame 8 of input_video is 64x32, the first one 32x32"),
        (TEXT, {"input_video": RED}, TypeError, "input_video=<PIL.*expected a list of.*; pass a list of images"),
        (TEXT, {"input_video": "clip.mp4"}, TypeError, "open a file with VideoData"),
        (TEXT, {"input_video": [RED] * 8 + ["x"]}, TypeError, "entry 8, 'x', is str"),
        (TEXT, {"input_video": torch.zeros(1, 3, 9, 16, 32)}, ValueError, r"shape \(1, 3, 9, 16, 32\); expected"),
        (TEXT, {"input_video": [RED] * 9, "num_frames": 10}, ValueError, "input_video has 9 frames.*13"),
        (TEXT, {"input_image": RED}, ValueError, "this network takes none; load an image-to-video model"),
        (TEXT, {"control_video": [RED] * 9}, ValueError, "takes none; load a Fun-Control"),
        (TEXT, {"reference_image": RED}, ValueError, "reference_image is given"),
        (
            TEXT,
            {"camera_control_direction": "Left"},
            ValueError,
            "camera_control_direction.*load a Control-Camera model",
        ),
        (TEXT, {"switch_DiT_boundary": 0.9}, MissingComponent, "'switch_DiT_boundary' needs dit2"),
        (TEXT, {"vace_video": [RED] * 9}, MissingComponent, "'vace_video' needs vace"),
        (TEXT, {"motion_bucket_id": 3}, MissingComponent, "'motion_bucket_id' needs motion_controller"),
        (TEXT, {"num_frames": 0}, ValueError, "num_frames=0: expected an integer, at least 1"),
        (TEXT, {"height": 32.5}, ValueError, "height=32.5"),
        (TEXT, {"tile_stride": (40, 26)}, ValueError, "would leave gaps"),
        (TEXT, {"tile_size": (0, 52)}, ValueError, "tile_size=\\(0, 52\\): expected two positive integers"),
        (
            TEXT,
            {"denoising_strength": 0.0},
            ValueError,
            "denoising_strength=0.0: expected a number, above 0 and at most 1",
        ),
        (
            TEXT | {"dit2": True},
            {"switch_DiT_boundary": 875},
            ValueError,
            "switch_DiT_boundary=875: expected a number, at least 0 and at most 1",
        ),
        (TEXT, {"tea_cache_l1_thresh": 0.1}, TypeError, "unknown argument 'tea_cache_l1_thresh': step_cache='tea:"),
        (TEXT, {"input_videos": []}, TypeError, "did you mean 'input_video'"),
        (TEXT, {"output_type": "quantised"}, ValueError, "output_type='quantised'"),
        (IMAGE, {}, ValueError, "pass input_image"),
        (IMAGE, {"end_image": RED}, ValueError, "end_image without input_image"),
        (IMAGE, {"input_image": "a.jpg"}, TypeError, "input_image='a.jpg': expected a PIL image"),
        (IMAGE, {"input_image": RED, "end_image": RED, "num_frames": 1}, ValueError, "end_image with num_frames=1"),
        (BOTH_ENDS, {"input_image": RED}, ValueError, "pass end_image"),
        (BOTH_ENDS, {"input_image": RED, "end_image": RED}, MissingComponent, "add the CLIP file"),
        (FRAMES, {"input_image": RED, "end_image": RED}, ValueError, "end_image is given.*a first image only"),
        (CONTROL, {}, ValueError, "pass control_video"),
        (CONTROL, {"control_video": [RED] * 4}, ValueError, "control_video has 4 frames"),
        (CAMERA, {"input_image": RED, "camera_control_direction": "Lift"}, ValueError, "did you mean 'Left'"),
        (CAMERA, {"input_image": RED, "end_image": RED}, ValueError, "end_image is given.*a first image only"),
        (
            VACE,
            {"vace_video": [RED] * 9, "vace_video_mask": [RED] * 10},
            ValueError,
            "mask has 10 frames, vace_video 9",
        ),
        (VACE, {"vace_reference_image": [RED, "x"]}, TypeError, "entry 1, 'x', is str"),
        (
            TEXT,
            {"animate2_reference_video": [RED] * 9},
            ValueError,
            "animate2_reference_video.*load an Animate-2 model",
        ),
        (IMAGE, {"input_image": RED, "animate2_log_scale": -1.3}, ValueError, "animate2_log_scale.*an Animate-2 model"),
        (ANIMATE_2, {}, ValueError, "pass animate2_reference_image and animate2_reference_video"),
        (ANIMATE_2, {"animate2_reference_image": RED}, ValueError, "; pass animate2_reference_video"),
        (ANIMATE_2, DANCE | {"animate2_reference_video": [RED] * 4}, ValueError, "reference_video has 4 frames"),
        (
            ANIMATE_2,
            DANCE | {"animate2_reference_image": "a.jpg"},
            TypeError,
            "reference_image='a.jpg': expected a PIL",
        ),
        (
            ANIMATE_2,
            DANCE | {"input_image": RED},
            ValueError,
            "input_image.*animate2_reference_image",
        ),
        (
            ANIMATE_2,
            DANCE | {"input_video": [RED] * 9},
            ValueError,
            "input_video.*animate2_refert_images",
        ),
        (ANIMATE_2, DANCE | {"animate2_refert_images": []}, ValueError, "animate2_refert_images=.*it is empty"),
        (ANIMATE_2, DANCE | {"animate2_refert_images": RED}, TypeError, "refert_images=.*; pass a list of images"),
        (
            ANIMATE_2,
            DANCE | {"animate2_refert_images": [RED] * 9},
            ValueError,
            "has 9 frames; expected fewer than num_frames=9",
        ),
        (ANIMATE_2, DANCE | {"animate2_refert_images": [RED, BLUE]}, ValueError, "frame 1 of animate2_refert_images"),
        (ANIMATE_2, DANCE | {"animate2_prompt_ref": ["a"]}, ValueError, r"animate2_prompt_ref=\['a'\]: expected text"),
        (ANIMATE_2, DANCE | {"animate2_log_scale": "low"}, ValueError, "animate2_log_scale='low': expected a number"),
        (
            ANIMATE_2,
            DANCE | {"cfg_merge": True},
            ValueError,
            "'attend_to_reference' gives each branch of guidance",
        ),
        (ANIMATE_2 | {"image_dim": 1280}, DANCE, MissingComponent, "add the CLIP file"),
        (VACE | {"dit2": True}, {"vace_video": [RED] * 9}, MissingComponent, "one of two experts has its VACE"),
    ],
)
def test_refused(networks, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline(**networks)("a puppy", **SIZE | arguments)


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Return a function that runs `diffsynth generate` in a folder of clips and returns stderr; no model may load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffsynth, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for name, frames in (("short.mp4", 5), ("clip.mp4", 9), ("long.mp4", 10)):
        save_video([RED] * frames, name)
    RED.save("red.png")
    Path("damaged.mp4").write_bytes(Path("clip.mp4").read_bytes()[:100])

    def tell(model, **settings):
        sets = [f"--set={name}={value}" for name, value in {"num_frames": 9, **settings}.items()]
        result = CliRunner().invoke(program, ["generate", model, "a puppy", "-o", "out.mp4", *sets])
        assert result.exit_code != 0
        return result.stderr

    return tell


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("wan2.1-t2v-1.3b", {"input_video": "short.mp4"}, "input_video has 5 frames, the video needs 9"),
        ("wan2.1-t2v-1.3b", {"input_video": "damaged.mp4"}, "damaged.mp4 cannot be read as video"),
        ("wan2.1-t2v-1.3b", {"num_frames": 0}, "num_frames=0: expected an integer, at least 1"),
        ("wan2.1-flf2v-14b-720p", {"end_image": "red.png"}, "end_image without input_image"),
        (
            "wan2.1-vace-1.3b",
            {"vace_video": "clip.mp4", "vace_video_mask": "long.mp4"},
            "vace_video_mask has 10 frames, vace_video 9",
        ),
        ("wan2.2-animate-2-14b", {"animate2_reference_image": "red.png"}, "pass animate2_reference_video"),
    ],
)
def test_the_command_line_tells_before_a_model_is_loaded(told, model, arguments, message):
    assert message in told(model, **arguments)


def test_frames_and_sides_off_the_rule_are_rounded_and_logged(caplog):
    pipe = pipeline()
    unit = pipe.program.units[0]
    with caplog.at_level(logging.WARNING):
        rounded = unit(height=33, width=32, num_frames=10, vae_factor=8, time_factor=4)
    assert rounded == (48, 32, 13)
    assert "33x32 is rounded up to 48x32, multiples of 16" in caplog.text
    assert "10 frames are rounded up to 13, 4n + 1" in caplog.text


def test_one_frame_is_an_image():
    assert pipeline().program.units[0](height=32, width=32, num_frames=1, vae_factor=16, time_factor=4) == (32, 32, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"camera_control_speed": 0.5}, {"camera_control_speed": "camera_control_direction is not given"}),
        ({"cfg_merge": True, "cfg_scale": 1.0}, {"cfg_merge": "guidance is off (cfg_scale=1.0)"}),
        ({"cfg_merge": True, "cfg_scale": 2.0}, {}),
        ({"tiled": False, "tile_size": (8, 8), "tile_stride": (4, 4)}, dict.fromkeys(TILES, "tiled is off")),
        ({"input_video": [RED] * 9}, {"input_video": "denoising_strength is 1"}),
        ({"input_video": [RED] * 9, "denoising_strength": 0.5}, {}),
        ({"animate2_log_scale": 0.0}, {}),
    ],
)
def test_arguments_without_effect(arguments, expected):
    assert pipeline(**TEXT).arguments_without_effect(prompt="a", **SIZE, **arguments) == expected


def test_a_scale_of_vace_without_its_inputs():
    call, scale = {"prompt": "a", **SIZE, "vace_scale": 0.5}, {"vace_scale": "no input of VACE is given"}
    assert pipeline(vace=True).arguments_without_effect(**call) == scale
    assert pipeline(vace=True).arguments_without_effect(**call, vace_reference_image=RED) == {}


def test_a_noise_level_needs_a_video():
    with pytest.raises(ValueError, match=r"denoising_strength=0\.5 is given without input_video"):
        pipeline(**TEXT).check(prompt="a", **SIZE, denoising_strength=0.5)
