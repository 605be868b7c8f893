"""Wan examples of DiffSynth-Studio run on the tiny hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from diffsynth.core.data.media import count_frames, frame_rate_of
from diffsynth.core.loader import header
from diffsynth.errors import CheckpointError, MissingComponent
from diffsynth.testing import tiny_hub
from limited import let_blocks_travel
from row_harness import Call, Harness, check_arguments, check_low_vram
from row_scripts import read_rows, video_script

ROWS = read_rows("wan")
STEPS = 10
"""Divisor of the number of steps: 50 become 5, one of which lies between the expert boundaries 0.9 and 0.875."""

PROMPT = {
    "prompt": '"Documentary photography style. A lively puppy runs across a green lawn."',
    "negative_prompt": '"overexposed, static, blurred"',
    "seed": "1",
    "tiled": "True",
}


@dataclass(frozen=True)
class Example:
    """Calls of a script, and the images and videos it opens."""

    calls: tuple[dict[str, str], ...]
    media: dict[str, str] = field(default_factory=dict)
    fps: int = 15
    vram_limit: bool = False
    lora: dict[str, str] | None = None


def example(*calls: dict[str, str], fps: int = 15, vram_limit: bool = False, **media: str) -> Example:
    files = {name: f"data/examples/wan/{file}" for name, file in media.items()}
    return Example(tuple(PROMPT | call for call in calls), files, fps, vram_limit)


UNGUIDED = {name: text for name, text in PROMPT.items() if name != "negative_prompt"}
IMAGE = {"input_image": "image"}
CONTROL = {"control_video": "control", "height": "832", "width": "576", "num_frames": "49"}
REFERENCE = CONTROL | {"reference_image": "reference"}
CAMERAS = [IMAGE | {"camera_control_direction": f'"{turn}"', "camera_control_speed": "0.01"} for turn in ("Left", "Up")]
VACE = [{"vace_video": "control"}, {"vace_reference_image": "image"}]
VACE.append(VACE[0] | VACE[1])
TEXT = example({})
I2V = example(IMAGE, image="input_image.jpg")
FUN_CONTROL = example(CONTROL, control="control_video.mp4")
FUN_REFERENCE = example(REFERENCE, control="control_video.mp4", reference="reference_image.png")
CAMERA = example(*CAMERAS, image="input_image.jpg")
VACE_EXAMPLE = example(*VACE, control="depth_video.mp4", image="cat_fightning.jpg")
ANIMATED = IMAGE | {"animate_pose_video": "pose", "animate_face_video": "face", "num_frames": "81"}
ANIMATED |= {"height": "720", "width": "1280", "num_inference_steps": "20", "cfg_scale": "1"}
SCENE = {"animate_inpaint_video": "scene", "animate_mask_video": "mask"}
ANIMATE_MEDIA = {"image": "animate.png", "pose": "pose.mp4", "face": "face.mp4", "scene": "bg.mp4", "mask": "mask.mp4"}
DANCE = {"animate2_reference_image": "image", "animate2_reference_video": "moves", "num_frames": "81"}
DANCE |= {"animate2_prompt_ref": '"a person dances, the background rests"', "animate2_offload_kv": "True"}
DANCE |= {"height": "1280", "width": "720", "num_inference_steps": "40", "cfg_scale": "3.0"}
FEW_STEPS = DANCE | {"num_inference_steps": "10", "cfg_scale": "1.0", "animate2_log_scale": "-1.3"}
NEXT_CLIP = {"animate2_refert_images": "video[-1:]"}
DANCE_MEDIA = {"image": "data/examples/wan/refimage.jpg", "moves": "data/examples/wan/refvideo.mp4"}
LARGE = {"height": "704", "width": "1248", "num_frames": "121"}

RUN: dict[str, Example] = {
    "Wan2.1-T2V-1.3B": example(
        {},
        {"input_video": 'VideoData("video_1_Wan2.1-T2V-1.3B.mp4", height=480, width=832)', "denoising_strength": "0.7"},
    ),
    "Wan2.1-T2V-14B": TEXT,
    "Wan2.1-I2V-14B-480P": I2V,
    "Wan2.1-I2V-14B-720P": example(IMAGE | {"height": "720", "width": "1280"}, image="input_image.jpg"),
    "Wan2.1-FLF2V-14B-720P": example(
        {"input_image": "first", "end_image": "last", "height": "960", "width": "960", "num_frames": "33"}
        | {"sigma_shift": "16"},
        first="first_frame.jpeg",
        last="last_frame.jpeg",
    ),
    "Wan2.1-VACE-1.3B-Preview": VACE_EXAMPLE,
    "Wan2.1-VACE-1.3B": VACE_EXAMPLE,
    "Wan2.1-VACE-14B": VACE_EXAMPLE,
    "Wan2.1-Fun-1.3B-InP": I2V,
    "Wan2.1-Fun-14B-InP": I2V,
    "Wan2.1-Fun-V1.1-1.3B-InP": I2V,
    "Wan2.1-Fun-V1.1-14B-InP": I2V,
    "Wan2.1-Fun-1.3B-Control": FUN_CONTROL,
    "Wan2.1-Fun-14B-Control": FUN_CONTROL,
    "Wan2.1-Fun-V1.1-1.3B-Control": FUN_REFERENCE,
    "Wan2.1-Fun-V1.1-14B-Control": FUN_REFERENCE,
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera": CAMERA,
    "Wan2.1-Fun-V1.1-14B-Control-Camera": CAMERA,
    "Wan2.1-1.3b-speedcontrol-v1": example({"motion_bucket_id": "0"}, {"motion_bucket_id": "100"}),
    "krea-realtime-video": Example(
        (UNGUIDED | {"num_inference_steps": "6", "num_frames": "81", "cfg_scale": "1", "sigma_shift": "20"},)
    ),
    "Wan2.2-T2V-A14B": TEXT,
    "Wan2.2-I2V-A14B": example(IMAGE | {"switch_DiT_boundary": "0.9"}, image="input_image.jpg"),
    "Wan2.2-TI2V-5B": example(LARGE, LARGE | IMAGE, image="cat_fightning.jpg"),
    "Wan2.2-Animate-14B": Example(
        tuple({**UNGUIDED, **call} for call in (ANIMATED, ANIMATED | SCENE)),
        {name: f"data/examples/wan/{file}" for name, file in ANIMATE_MEDIA.items()},
        lora={"model_id": "Wan-AI/Wan2.2-Animate-14B", "origin_file_pattern": "relighting_lora.ckpt"},
    ),
    "Wan2.2-Animate-2-14B": Example((PROMPT | DANCE, PROMPT | DANCE | NEXT_CLIP), DANCE_MEDIA, fps=24),
    "Wan2.2-Animate-2-14B-Distilled": Example(
        (UNGUIDED | FEW_STEPS, UNGUIDED | FEW_STEPS | NEXT_CLIP), DANCE_MEDIA, fps=24
    ),
    "Wan2.2-VACE-Fun-A14B": Example(VACE_EXAMPLE.calls, VACE_EXAMPLE.media, vram_limit=True),
    "Wan2.2-Fun-A14B-InP": I2V,
    "Wan2.2-Fun-A14B-Control": FUN_REFERENCE,
    "Wan2.2-Fun-A14B-Control-Camera": CAMERA,
}
"""Row -> its calls, with the values of DiffSynth-Studio's table."""

MODEL_OF = {"Wan2.1-VACE-1.3B-Preview": "VACE-Wan2.1-1.3B-Preview"}
"""Row -> its model, where the names differ."""

LATER = {
    "LongCat-Video",
    "Video-As-Prompt-Wan2.1-14B",
    "Wan-Dancer-14B-global",
    "Wan-Dancer-14B-local",
    "Wan2.2-S2V-14B",
    "Wan2.2-S2V-14B_multi_clips",
}
"""Rows that are not supported yet: LongCat, Video-As-Prompt, Wan-Dancer and S2V have other networks and encoders."""

COUNTED = [
    "Wan2.1-T2V-1.3B",
    "Wan2.1-I2V-14B-720P",
    "Wan2.1-FLF2V-14B-720P",
    "Wan2.1-VACE-1.3B",
    "Wan2.1-Fun-V1.1-1.3B-Control",
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera",
    "Wan2.1-1.3b-speedcontrol-v1",
    "krea-realtime-video",
    "Wan2.2-I2V-A14B",
    "Wan2.2-TI2V-5B",
    "Wan2.2-Animate-2-14B-Distilled",
    "Wan2.2-Fun-A14B-Control",
]
"""One row of each kind, whose arguments are tested one by one; rows of the same networks in other sizes only run.

Animate only runs, too, as its faces have 512 x 512 pixels even here: `tests/wan/test_animate_trajectory.py` tests its
arguments.
"""

IN_LITTLE_MEMORY = ["Wan2.1-VACE-1.3B", "Wan2.2-I2V-A14B"]
"""Rows that run in the form for little memory, too: one with a second network, and one with two experts."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def harness(hub, monkeypatch, tmp_path) -> Harness:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return Harness(monkeypatch, tmp_path, steps=STEPS, precise=True)


def run(harness: Harness, name: str, *, low_vram: bool = False) -> list[Call]:
    tiny_hub(os.environ["DIFFSYNTH_MODEL_BASE_PATH"], MODEL_OF.get(name, name))
    one = RUN[name]
    if one.lora is not None:
        write_lora(
            Path(os.environ["DIFFSYNTH_MODEL_BASE_PATH"]) / one.lora["model_id"], one.lora["origin_file_pattern"]
        )
    row = ROWS[f"wanvideo/{name}"]
    options = {"vram_limit": one.vram_limit, "low_vram": low_vram}
    script = video_script(row, one.calls, media=one.media, fps=one.fps, lora=one.lora, **options)
    return harness.run(script)


def write_lora(folder: Path, name: str) -> None:
    """Write a LoRA of the queries of the network in a folder, as training does."""
    shapes = header.read(sorted(folder.glob("diffusion_pytorch_model*.safetensors"))).shapes
    weights = {}
    for key, (outputs, inputs) in ((key, shape) for key, shape in shapes.items() if key.endswith("self_attn.q.weight")):
        module = key.removesuffix(".weight")
        weights[f"diffusion_model.{module}.lora_A.default.weight"] = torch.randn(2, inputs)
        weights[f"diffusion_model.{module}.lora_B.default.weight"] = torch.randn(outputs, 2)
    torch.save(weights, folder / name)


def size_of(call: Call, name: str, *, default: bool = False) -> int:
    """Return a size as the harness divides it and the pipeline rounds it up."""
    usual = call.pipe.__signature__.parameters[name].default
    multiple = 2 * call.pipe.vae.config.factor
    asked = usual if default else call.arguments.get(name, usual)
    return -(-(asked // 16) // multiple) * multiple


def test_every_row_is_here():
    assert len(ROWS) == 36
    assert {name.removeprefix("wanvideo/") for name in ROWS} == {*RUN, *LATER}
    assert set(COUNTED) <= set(RUN)


@pytest.mark.parametrize("name", RUN)
def test_a_row_runs(name, harness):
    harness.steps = 50
    calls = run(harness, name)
    row = ROWS[f"wanvideo/{name}"]
    assert set().union(*(call.arguments for call in calls)) == set(row["call"])
    assert bool(row["methods"]) == bool(RUN[name].lora) == bool(calls[-1].pipe.loras)
    for number, call in enumerate(calls, start=1):
        frames = {81: 9, 49: 5, 33: 5, 121: 13}[call.arguments.get("num_frames", 81)]
        frames -= 4 * ("animate_pose_video" in call.arguments)
        file = harness.folder / f"video_{number}_{name}.mp4"
        assert {frame.size for frame in call.output} == {(size_of(call, "width"), size_of(call, "height"))}
        assert (len(call.output), count_frames(file), frame_rate_of(file)) == (frames, frames, RUN[name].fps)


@pytest.mark.parametrize("name", COUNTED)
def test_every_argument_of_a_row_counts(name, harness):
    if {"num_inference_steps", "sigma_shift"} <= set(ROWS[f"wanvideo/{name}"]["call"]):
        harness.steps = 3  # a single step starts at 1 for every shift
    call = run(harness, name)[-1]
    changed = {argument for argument in call.arguments if not call.is_default(argument)}
    assert {"prompt", "seed"} <= changed | {"seed"}
    same = {  # 960 and 832 pixels both become 64
        argument
        for argument in changed & {"height", "width"}
        if size_of(call, argument) == size_of(call, argument, default=True)
    }
    check_arguments(call, unchanging=same | {"animate2_offload_kv"})  # which changes the placement in memory only


@pytest.mark.parametrize("name", IN_LITTLE_MEMORY)
def test_the_form_for_little_memory_of_a_row_gives_the_same_bits(name, harness, monkeypatch):
    harness.steps = 50
    plain = run(harness, name)[-1]
    let_blocks_travel(monkeypatch)
    call = run(harness, name, low_vram=True)[-1]
    check_low_vram(call, plain, stored=torch.float32, on_disk=True)


def test_common_files_come_from_one_repository_unless_they_are_here(harness, hub):
    (call,) = run(harness, "Wan2.1-T2V-14B")
    (file,) = call.pipe.component_files["vae"]
    assert file.relative_to(hub).parts[:2] == ("DiffSynth-Studio", "Wan-Series-Converted-Safetensors")
    script = video_script(ROWS["wanvideo/Wan2.1-T2V-14B"], TEXT.calls)
    with pytest.raises(CheckpointError, match=r"Wan-AI/Wan2.1-T2V-14B.*models_t5_umt5-xxl-enc-bf16.pth"):
        harness.run(script.replace("torch_dtype=", "redirect_common_files=False, torch_dtype=", 1))


def test_one_expert_alone_is_refused_before_anything_is_loaded(harness):
    """Rows without support raise although no file exists."""
    row = ROWS["wanvideo/Wan2.2-T2V-A14B"]
    files = [file for file in row["files"] if "low_noise_model" not in file["origin_file_pattern"]]
    with pytest.raises(MissingComponent, match="only the high-noise expert.*low_noise_model"):
        harness.run(video_script({**row, "files": files}, TEXT.calls))


@pytest.mark.parametrize("argument", ["s2v_pose_video", "longcat_video", "vap_video"])
def test_an_argument_of_a_missing_part_is_not_ignored(argument, harness, hub):
    tiny_hub(hub, "Wan2.1-T2V-14B")
    script = video_script(ROWS["wanvideo/Wan2.1-T2V-14B"], [PROMPT | {argument: "[]"}])
    with pytest.raises(TypeError, match=argument):
        harness.run(script)
