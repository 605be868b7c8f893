"""`cfg_merge`: both branches in one batch equal two calls, or are refused with the name of the unit that differs."""

from __future__ import annotations

import functools

import pytest
import torch
from PIL import Image

import diffsynth
from diffsynth.core.parallel import MeshAxis, ProcessMesh
from diffsynth.runtime.progress import no_progress
from diffsynth.testing import tiny_hub
from diffsynth_wan import WanVideoPipeline
from parity import relative_error

IMAGE = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
CLIP = [IMAGE.rotate(9 * turn) for turn in range(5)]
CALL = {
    "prompt": "a puppy",
    "negative_prompt": "blurred",
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 2,
    "cfg_scale": 3.0,
    "seed": 0,
    "output_type": "latents",
    "progress_bar_cmd": no_progress,
}
CASES = {
    "wan2.1-fun-v1.1-1.3b-control": {"control_video": CLIP, "reference_image": IMAGE},
    "wan2.2-ti2v-5b": {"input_image": IMAGE, "height": 64, "width": 64},
    "wan2.2-vace-fun-a14b": {"vace_video": CLIP, "switch_DiT_boundary": 0.9},
    "wan2.1-1.3b-speedcontrol-v1": {"motion_bucket_id": 40, "prompt": ["a puppy", "two puppies"]},
}
"""A model for each kind of condition: channels, prefix frames, time per frame, two experts; two prompts at once."""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")

    def loaded(name: str) -> WanVideoPipeline:
        tiny_hub(tmp_path, name)
        return diffsynth.load(name, device="cpu", torch_dtype=torch.float32)

    return loaded


@pytest.mark.parametrize("name", CASES)
def test_one_batch_gives_what_two_calls_give(name, load, monkeypatch):
    pipe, sizes, plain = load(name), [], WanVideoPipeline.velocity

    @functools.wraps(plain)
    def velocity(self, latents, *args, **more):
        sizes.append(len(latents))
        return plain(self, latents, *args, **more)

    monkeypatch.setattr(WanVideoPipeline, "velocity", velocity)
    call = CALL | CASES[name]
    apart = pipe(**call)
    together = pipe(**call, cfg_merge=True)
    videos = len(apart)
    assert sizes == [videos] * 4 + [2 * videos] * 2
    assert relative_error(together, apart) < 1e-5
    assert relative_error(pipe(**call | {"cfg_scale": 1.0}, cfg_merge=True), apart) > 1e-3
    assert sizes[6:] == [videos] * 2  # without guidance there is one branch


def test_what_cannot_be_merged_is_refused_by_name(load):
    """Animate's branches have different faces."""
    pipe = load("wan2.2-animate-14b")
    clips = {"input_image": IMAGE, "animate_pose_video": CLIP, "animate_face_video": CLIP}
    with pytest.raises(
        ValueError, match="cfg_merge=True: unit 'encode_animate_motion' gives each branch.*its own animate_motion"
    ):
        pipe.check(**CALL | clips, cfg_merge=True)
    pipe.check(**CALL | clips | {"cfg_scale": 1.0}, cfg_merge=True)
    pipe.check(**CALL | clips)


def test_branches_of_two_processes_are_not_merged(load):
    pipe = load("wan2.1-t2v-1.3b")
    pipe.mesh = ProcessMesh(branches=MeshAxis(size=2))
    with pytest.raises(ValueError, match=r"cfg_merge=True and pipe.parallel\(cfg=2\)"):
        pipe.check(**CALL, cfg_merge=True)
