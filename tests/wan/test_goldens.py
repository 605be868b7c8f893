"""Whole calls of models without another implementation: modules of zeros change no bit, and goldens stay the same.

Networks are the tiny hub's, whose weights depend only on their names.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import diffsynth
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
    "seed": 0,
    "output_type": "latents",
    "progress_bar_cmd": no_progress,
}
CAMERA = {"input_image": IMAGE, "camera_control_direction": "LeftUp", "camera_control_speed": 0.1}

GOLDENS = {
    "wan2.1-fun-v1.1-1.3b-control-camera": [0.1642, 1.8938, 1.359, -1.0341, -1.9948, -2.219],
    "wan2.2-fun-a14b-control-camera": [0.0451, 2.1598, 0.2354, -1.0313, 1.4484, 0.6422],
    "wan2.1-fun-v1.1-1.3b-control": [0.1376, 2.0662, -1.4542, 0.9863, 1.0088, 0.8415],
    "wan2.1-1.3b-speedcontrol-v1": [-0.2808, 2.1376, -1.3455, 2.8295, -0.2339, -0.0665],
    "krea-realtime-video": [0.1201, 2.1264, -2.2027, -1.7669, -1.7128, -1.0769],
}
"""Mean, standard deviation and four values of the latents; they change only with the numerics."""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")

    def loaded(name: str) -> WanVideoPipeline:
        tiny_hub(tmp_path, name)
        return diffsynth.load(name, device="cpu", torch_dtype=torch.float32)

    return loaded


def is_golden(name: str, latents: torch.Tensor) -> bool:
    values = [latents.mean(), latents.std(), *latents.flatten()[:: latents.numel() // 4][:4]]
    found = [round(float(value), 4) for value in values]
    return all(abs(a - b) <= 2e-3 for a, b in zip(found, GOLDENS[name], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan2.1-fun-v1.1-1.3b-control-camera", "wan2.2-fun-a14b-control-camera"])
def test_a_camera(name, load):
    """With an adapter of zeros, the camera's direction changes nothing."""
    pipe = load(name)
    turned = pipe(**CALL | CAMERA)
    assert is_golden(name, turned)
    assert relative_error(pipe(**CALL | CAMERA | {"camera_control_direction": "RightDown"}), turned) > 1e-3
    assert relative_error(pipe(**CALL | CAMERA | {"camera_control_speed": 0.2}), turned) > 1e-3
    for network in (pipe.dit, pipe.dit2):
        for parameter in network.control_adapter.parameters() if network is not None else ():
            parameter.zero_()
    still = pipe(**CALL, input_image=IMAGE)
    assert torch.equal(pipe(**CALL | CAMERA), still)
    assert relative_error(still, turned) > 1e-3


@torch.no_grad()
def test_control_with_a_reference(load):
    """A `ref_conv` of zeros does not equal no image: all tokens still attend to the frame of zeros."""
    pipe = load("wan2.1-fun-v1.1-1.3b-control")
    latents = pipe(**CALL, control_video=CLIP, reference_image=IMAGE)
    assert is_golden("wan2.1-fun-v1.1-1.3b-control", latents)
    assert latents.shape == (1, 16, 2, 4, 6)
    assert relative_error(pipe(**CALL, control_video=CLIP, reference_image=CLIP[3]), latents) > 1e-3
    assert relative_error(pipe(**CALL, control_video=CLIP[::-1], reference_image=IMAGE), latents) > 1e-3


@torch.no_grad()
def test_speed(load):
    """With the controller's initial last layer of zeros, the amount of motion changes nothing."""
    pipe = load("wan2.1-1.3b-speedcontrol-v1")
    fast = pipe(**CALL, motion_bucket_id=100)
    assert is_golden("wan2.1-1.3b-speedcontrol-v1", fast)
    assert relative_error(pipe(**CALL, motion_bucket_id=0), fast) > 1e-3
    for parameter in pipe.motion_controller.linear[4].parameters():
        parameter.zero_()
    assert torch.equal(pipe(**CALL, motion_bucket_id=100), pipe(**CALL))


@torch.no_grad()
def test_few_steps(load):
    """The network runs six times, at the noise levels 20 u / (1 + 19 u) for u = 1, 5/6, ..., 1/6."""
    pipe, levels = load("krea-realtime-video"), []
    call = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    latents = pipe(**call, on_step=lambda step: levels.append(step.sigma))
    assert levels == pytest.approx([1, 0.990099, 0.975610, 0.952381, 0.909091, 0.8], abs=1e-6)
    assert is_golden("krea-realtime-video", latents)
    assert torch.equal(pipe(**call | {"negative_prompt": "anything"}), latents)  # no guidance
