"""Variants without an oracle: reference implementations, exact special cases, goldens, and refused inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import parity
from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.dit import CameraAdapter, WanDiT
from diffsynth_wan.extension import Stream
from diffsynth_wan.features.camera import CameraMotion
from diffsynth_wan.features.control import ReferenceFrame
from diffsynth_wan.tiny import (
    TINY_ANIMATE,
    TINY_DIT,
    TINY_MOTION_CONTROLLER,
    TINY_VACE,
    tiny_animate_inputs,
    tiny_dit_inputs,
)
from diffsynth_wan.variants.animate import AnimateMotion, WanAnimateAdapter
from diffsynth_wan.variants.animate2 import RecordReference, ReferenceAttention, ReferenceKVCache
from diffsynth_wan.variants.motion_encoder import MotionEncoder
from diffsynth_wan.variants.speed import SpeedControl, WanMotionController
from diffsynth_wan.variants.vace import VaceControl, WanVace, hinted_blocks

CAMERA = replace(TINY_DIT, camera_channels=24)
REFERENCE = replace(TINY_DIT, reference_channels=16)


def rand(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    constants = dict(module.named_buffers())
    module.load_state_dict(parity.draw_weights(parity.shapes_of(module), seed) | constants)
    return module.eval()


def inputs(config: WanDiTConfig = TINY_DIT) -> dict[str, Tensor]:
    return tiny_dit_inputs(config, torch.Generator().manual_seed(0))


def golden(out: Tensor) -> list[float]:
    """Return mean, standard deviation and four values of an output."""
    values = [out.mean(), out.std(), *out.flatten()[:: out.numel() // 4][:4]]
    return [round(float(value), 4) for value in values]


def close(ours: list[float], truth: list[float]) -> bool:
    return all(abs(a - b) <= 2e-3 for a, b in zip(ours, truth, strict=True))


# Camera adapter


@torch.no_grad()
def test_a_camera_adapter_of_zeros_changes_no_bit() -> None:
    dit = drawn(WanDiT(CAMERA))
    plain = dit(**inputs())
    for parameter in dit.control_adapter.parameters():
        parameter.zero_()
    assert torch.equal(dit(**inputs(), extensions=[CameraMotion(rand(2, 24, 3, 48, 32))]), plain)


@torch.no_grad()
def test_the_camera_adapter_equals_its_reference_implementation() -> None:
    """A latent pixel has 24 x 64 channels, ordered by ray, then row, then column."""
    adapter = drawn(CameraAdapter(replace(CAMERA, camera_layers=2)))
    rays = rand(1, 24, 2, 32, 48)
    frames = []
    for frame in rays[0].unbind(1):
        folded = torch.stack([frame[c, y::8, x::8] for c in range(24) for y in range(8) for x in range(8)])
        tokens = torch.zeros(256, 2, 3)
        for y in range(2):
            for x in range(3):
                patch = folded[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                tokens[:, y, x] = torch.einsum("ecij,cij->e", adapter.conv.weight, patch) + adapter.conv.bias
        for block in adapter.residual_blocks:
            hidden = F.conv2d(tokens[None], block.conv1.weight, block.conv1.bias, padding=1)[0].clamp(min=0)
            tokens = tokens + F.conv2d(hidden[None], block.conv2.weight, block.conv2.bias, padding=1)[0]
        frames.append(tokens.flatten(1).T)
    assert parity.relative_error(adapter(rays)[0], torch.cat(frames)) < 1e-5


@torch.no_grad()
def test_camera_golden() -> None:
    """The adapter's output is added to the tokens of each frame before the blocks, as in the published code."""
    dit = drawn(WanDiT(CAMERA))
    out = dit(**inputs(), extensions=[CameraMotion(rand(2, 24, 3, 48, 32))])
    assert close(golden(out), GOLDENS["camera"])


# Reference image


@torch.no_grad()
def test_a_reference_is_a_frame_in_front() -> None:
    """With the patch embedding's weights in `ref_conv`, the result equals that of a video of one more frame."""
    dit = drawn(WanDiT(REFERENCE))
    dit.ref_conv.weight.copy_(dit.patch_embedding.weight[:, :, 0])
    dit.ref_conv.bias.copy_(dit.patch_embedding.bias)
    arguments, image = inputs(), rand(2, 16, 6, 4)
    longer = dit(**{**arguments, "latents": torch.cat((image[:, :, None], arguments["latents"]), dim=2)})[:, :, 1:]
    ours = dit(**arguments, extensions=[ReferenceFrame(image)])
    assert parity.relative_error(ours, longer) < 1e-5
    assert parity.relative_error(ours, dit(**arguments)) > 1e-3


@torch.no_grad()
def test_reference_golden() -> None:
    """The image's tokens are at time 0 and the video's from 1 on, as in the published code."""
    out = drawn(WanDiT(REFERENCE))(**inputs(), extensions=[ReferenceFrame(rand(2, 16, 6, 4))])
    assert close(golden(out), GOLDENS["reference"])


# Speed control


@torch.no_grad()
def test_a_controller_of_zeros_changes_no_bit() -> None:
    """The last layer is initialised with zeros, so speed control changes nothing."""
    dit, controller = drawn(WanDiT(TINY_DIT)), drawn(WanMotionController(TINY_MOTION_CONTROLLER))
    for parameter in controller.linear[4].parameters():
        parameter.zero_()
    speed = SpeedControl(controller(torch.tensor([100.0])))
    assert torch.equal(dit(**inputs(), extensions=[speed]), dit(**inputs()))


@torch.no_grad()
def test_speed_golden() -> None:
    """The amount of motion is scaled by 10; the six vectors are added to the modulation by time."""
    dit, controller = drawn(WanDiT(TINY_DIT)), drawn(WanMotionController(TINY_MOTION_CONTROLLER))
    slow, fast = (dit(**inputs(), extensions=[SpeedControl(controller(torch.tensor([x])))]) for x in (0.0, 100.0))
    assert parity.relative_error(slow, fast) > 1e-3
    assert close(golden(fast), GOLDENS["speed"])
    by_hand = dit.embed(**inputs(), image_embeds=None, condition_latents=None)
    added = controller(torch.tensor([100.0]))
    assert torch.equal(SpeedControl(added)(dit, by_hand).modulation, by_hand.modulation + added[:, None])


# VACE


@torch.no_grad()
def test_vace_at_scale_0_changes_no_bit() -> None:
    dit, vace = drawn(WanDiT(TINY_DIT)), drawn(WanVace(TINY_VACE))
    control = VaceControl(vace, rand(2, 96, 3, 6, 4), scale=0.0)
    assert torch.equal(dit(**inputs(), extensions=[control]), dit(**inputs()))


@torch.no_grad()
def test_vace_with_fewer_frames_is_followed_by_nothing() -> None:
    dit, vace = drawn(WanDiT(TINY_DIT)), drawn(WanVace(TINY_VACE))
    short = dit(**inputs(), extensions=[VaceControl(vace, rand(2, 96, 2, 6, 4))])
    assert short.isfinite().all()
    with pytest.raises(ValueError, match="control_latents give 24 tokens, the video has 18"):
        dit(**inputs(), extensions=[VaceControl(vace, rand(2, 96, 4, 6, 4))])


def test_hints_spread_evenly() -> None:
    assert list(hinted_blocks(30, 15)) == list(range(0, 30, 2))
    assert list(hinted_blocks(40, 8)) == [0, 5, 10, 15, 20, 25, 30, 35]
    with pytest.raises(ValueError, match="8 blocks of VACE do not divide the 30 blocks"):
        hinted_blocks(30, 8)


def test_vace_gradients_do_not_depend_on_checkpointing() -> None:
    dit, vace = drawn(WanDiT(TINY_DIT)), drawn(WanVace(TINY_VACE))
    gradients = []
    for switch in (False, True):
        vace.gradient_checkpointing = dit.gradient_checkpointing = switch
        vace.zero_grad()
        dit(**inputs(), extensions=[VaceControl(vace, rand(2, 96, 3, 6, 4))]).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in vace.named_parameters()})
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# Animate


@torch.no_grad()
def test_animate_refuses_what_does_not_fit() -> None:
    adapter = drawn(WanAnimateAdapter(TINY_ANIMATE))
    pose, face = adapter(**tiny_animate_inputs(TINY_ANIMATE, torch.Generator().manual_seed(0)))
    assert (tuple(pose.shape), tuple(face.shape)) == ((1, 16, 256), (1, 3, 3, 256))
    assert not face[:, 0].any()
    dit = drawn(WanDiT(TINY_DIT))
    arguments = {**inputs(), "latents": rand(2, 16, 3, 4, 8)}
    assert dit(**arguments, extensions=[AnimateMotion(adapter, pose, face)]).isfinite().all()
    with pytest.raises(ValueError, match="for 3 frames of 6 tokens, the first one without a pose, expected 12 and 3"):
        dit(**inputs(), extensions=[AnimateMotion(adapter, pose, face)])
    three = drawn(WanAnimateAdapter(replace(TINY_ANIMATE, num_layers=3)))
    with pytest.raises(ValueError, match="3 face blocks do not divide the 2 blocks"):
        dit(**arguments, extensions=[AnimateMotion(three, pose, face)])
    with pytest.raises(ValueError, match="faces are 16x24; expected 16x16"):
        MotionEncoder(TINY_ANIMATE)(torch.zeros(1, 3, 16, 24))


# Animate-2


@pytest.mark.parametrize("log_scale", [0.0, -1.3])
def test_reference_attention_equals_one_masked_softmax(log_scale: float) -> None:
    """Reference implementation: all keys at once, other frames of the reference masked, frame 1's keys biased."""
    frames, per_frame = 4, 3
    q, k, v = (rand(2, frames * per_frame, 2, 8, seed=seed) for seed in (1, 2, 3))
    reference_k, reference_v = (rand(1, (frames - 1) * per_frame, 2, 8, seed=seed) for seed in (4, 5))
    cache = ReferenceKVCache(blocks={0: (reference_k, reference_v)})
    empty = torch.zeros(0)
    stream = Stream(
        tokens=empty,
        positions=(tuple(range(frames)), (0,), tuple(range(per_frame))),
        rotary=(empty, empty),
        context=empty,
        time=empty,
        modulation=empty,
    )
    ours = ReferenceAttention(cache, log_scale)(drawn(WanDiT(TINY_DIT)), stream).attend(0)(q, k, v)

    frame_of = torch.arange(frames).repeat_interleave(per_frame)
    sees = torch.cat((torch.ones(12, 12, dtype=torch.bool), frame_of[:, None] - 1 == frame_of[None, :9]), dim=1)
    bias = torch.zeros(21)
    bias[per_frame : 2 * per_frame] = log_scale
    keys, values = (
        torch.cat((own, other.expand(2, -1, -1, -1)), dim=1) for own, other in ((k, reference_k), (v, reference_v))
    )
    call = AttentionCall(
        q, keys, values, mask=sees[None, None], causal=False, scale=8**-0.5, score_bias=bias[None, None, None]
    )
    assert parity.relative_error(ours, NaiveAttention()(call)) < 1e-5


@torch.no_grad()
def test_reference_attention_needs_a_recorded_reference() -> None:
    dit = drawn(WanDiT(TINY_DIT))
    with pytest.raises(ValueError, match="no keys and values of block 0"):
        dit(**inputs(), extensions=[ReferenceAttention(ReferenceKVCache())])
    video = ReferenceKVCache()
    dit(**inputs(), extensions=[RecordReference(video)])
    assert sorted(video.blocks) == [0, 1]
    assert [tuple(x.shape) for x in video.blocks[0]] == [(2, 18, 2, 128)] * 2


@torch.no_grad()
def test_a_recorded_reference_is_one_frame_later_and_to_the_right() -> None:
    dit = drawn(WanDiT(TINY_DIT))
    stream = dit.embed(**inputs(), image_embeds=None, condition_latents=None)
    assert RecordReference(ReferenceKVCache())(dit, stream).positions == ((1, 2, 3), (0, 1, 2), (2, 3))


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        (CameraMotion(torch.zeros(1, 24, 3, 48, 32)), "this network has no camera adapter"),
        (ReferenceFrame(torch.zeros(1, 16, 6, 4)), "this network takes no reference image"),
    ],
)
def test_a_network_without_the_part_refuses(extension: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanDiT(TINY_DIT)(**inputs(), extensions=[extension])


@torch.no_grad()
def test_one_condition_serves_a_batch() -> None:
    dit = drawn(WanDiT(REFERENCE))
    image = rand(1, 16, 6, 4)
    one, both = ReferenceFrame(image), ReferenceFrame(image.expand(2, -1, -1, -1))
    assert parity.relative_error(dit(**inputs(), extensions=[one]), dit(**inputs(), extensions=[both])) < 1e-5
    dit, vace = drawn(WanDiT(TINY_DIT)), drawn(WanVace(TINY_VACE))
    control = rand(1, 96, 3, 6, 4)
    one, both = VaceControl(vace, control), VaceControl(vace, control.expand(2, -1, -1, -1, -1))
    assert parity.relative_error(dit(**inputs(), extensions=[one]), dit(**inputs(), extensions=[both])) < 1e-5


def test_a_reference_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has \(2, 2\) tokens, a frame of the video \(3, 2\)"):
        WanDiT(REFERENCE)(**inputs(), extensions=[ReferenceFrame(torch.zeros(1, 16, 4, 4))])


GOLDENS = {
    "camera": [-0.0108, 1.4676, -1.2815, -0.5217, -0.6325, -0.9462],
    "reference": [-0.2251, 1.8952, -1.1435, -0.2617, -0.9567, -1.0217],
    "speed": [0.0933, 1.8745, -0.1692, 0.2127, 1.2156, -0.0741],
}
"""Results of our own code for fixed seeds; they change only with the numerics."""
