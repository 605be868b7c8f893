"""Sliding windows: their conditions, blending, and what is refused with them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import parity
from diffsynth.runtime.feature import Condition, Feature, StepContext
from diffsynth.runtime.loop import velocity_in_windows
from diffsynth.runtime.unit import unit
from diffsynth.sampling.windows import SlidingWindow
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_wan import WanVideoPipeline
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.dit import WanDiT
from diffsynth_wan.extension import FramePositions
from diffsynth_wan.features.animate2 import cache_reference_video
from diffsynth_wan.features.camera import CameraMotion
from diffsynth_wan.features.control import ReferenceFrame
from diffsynth_wan.features.vace import VaceCondition
from diffsynth_wan.tiny import TINY_ANIMATE, TINY_DIT, TINY_VACE
from diffsynth_wan.variants.animate import AnimateMotion, WanAnimateAdapter
from diffsynth_wan.variants.animate2 import REFERENCE_TIME, RecordReference, ReferenceAttention, ReferenceKVCache
from diffsynth_wan.variants.speed import SpeedControl
from diffsynth_wan.variants.vace import VaceControl, WanVace
from wan_oracles import oracle_dit, oracle_vace_dit, our_dit, our_vace, shared_parts

SIGMA = torch.tensor([0.7])
PROMPT = torch.randn(1, 7, TINY_DIT.text_dim, generator=torch.Generator().manual_seed(1))


def rand(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(module: nn.Module) -> nn.Module:
    module.load_state_dict(parity.draw_weights(parity.shapes_of(module)) | dict(module.named_buffers()))
    return module.eval().requires_grad_(False)


class Idle(nn.Module):
    """A component of which only the config is read."""

    config = SimpleNamespace(factor=8, time_factor=4)

    def encode_pieces(self, *given, **named):
        raise AssertionError("the component ran")

    decode_pieces = encode_pieces


def pipeline(dit: nn.Module, cls: type[WanVideoPipeline] = WanVideoPipeline, **more: nn.Module) -> WanVideoPipeline:
    return cls.from_components(
        dit=dit,
        text_encoder=Idle(),
        vae=Idle(),
        tokenizer=byte_tokenizer(),
        device="cpu",
        torch_dtype=torch.float32,
        **more,
    )


def windowed(pipe: WanVideoPipeline, latents: Tensor, sliding_window: SlidingWindow, **conditions: Any) -> Tensor:
    """Return the velocity of all windows, blended, as the loop computes it."""
    step = StepContext(float(SIGMA[0]), networks=pipe.components)
    return velocity_in_windows(pipe, latents, SIGMA, conditions, step, sliding_window)


def blended(parts: list[tuple[list[int], list[float], Tensor]], frames: int) -> Tensor:
    """Return the blend, frame by frame in fp64."""
    rows = []
    for frame in range(frames):
        hits = [(w[f.index(frame)], v[:, :, f.index(frame)].double()) for f, w, v in parts if frame in f]
        rows.append(sum(weight * value for weight, value in hits) / sum(weight for weight, _ in hits))
    return torch.stack(rows, dim=2).float()


CUTS = [([0, 1, 2, 3], [1, 1, 0.75, 0.25]), ([2, 3, 4, 5], [0.25, 0.75, 0.75, 0.25]), ([4, 5, 6], [0.25, 0.75, 1])]
"""Frames and weights of the windows of 7 frames, with size 4 and stride 2."""

LATENTS = rand(1, 16, 7, 4, 4)
WITH_LEAD = rand(1, 16, 8, 4, 4)


@torch.no_grad()
def test_image_latents_and_camera_are_cut_and_reference_and_speed_are_not():
    config = replace(TINY_DIT, in_channels=36, camera_channels=24, reference_channels=16)
    dit = drawn(WanDiT(config))
    image, rays = rand(1, 20, 7, 4, 4, seed=6), rand(1, 24, 7, 32, 32, seed=7)
    whole = (SpeedControl(rand(1, 6, config.dim, seed=8)), ReferenceFrame(rand(1, 16, 4, 4, seed=9)))
    for camera in (True, False):  # no published network has both a camera and a reference image
        parts = []
        for frames, weights in CUTS:
            extensions = [FramePositions(tuple(frames))]
            extensions += [CameraMotion(rays[:, :, frames])] if camera else [whole[1]]
            extensions.append(whole[0])
            velocity = dit(LATENTS[:, :, frames], SIGMA, PROMPT, None, image[:, :, frames], extensions=extensions)
            parts.append((frames, weights, velocity))
        more = {"camera_motion": CameraMotion(rays)} if camera else {"reference_frame": whole[1]}
        found = windowed(
            pipeline(dit),
            LATENTS,
            SlidingWindow(4, 2),
            prompt_embeds=PROMPT,
            condition_latents=image,
            speed_control=whole[0],
            **more,
        )
        assert torch.allclose(found, blended(parts, 7), atol=1e-5)


@torch.no_grad()
def test_vace_is_cut_and_every_window_sees_the_reference_images():
    dit, vace = drawn(WanDiT(TINY_DIT)), drawn(WanVace(TINY_VACE))
    control = rand(1, 96, 8, 4, 4, seed=6)
    parts = []
    for frames, weights in CUTS:
        frames, weights = [0, *(frame + 1 for frame in frames)], [1, *weights]
        extensions = [FramePositions(tuple(frames)), VaceControl(vace, control[:, :, frames], 0.5)]
        velocity = dit(WITH_LEAD[:, :, frames], SIGMA, PROMPT, extensions=extensions)
        parts.append((frames, weights, velocity))
    found = windowed(
        pipeline(dit, vace=vace),
        WITH_LEAD,
        SlidingWindow(4, 2, prefix_frames=1),
        prompt_embeds=PROMPT,
        vace_condition=VaceCondition(control, 0.5),
    )
    assert torch.allclose(found, blended(parts, 8), atol=1e-5)


@torch.no_grad()
def test_animate_is_cut_and_every_window_sees_the_character():
    dit, adapter = drawn(WanDiT(TINY_DIT)), drawn(WanAnimateAdapter(TINY_ANIMATE))
    pose, face = rand(1, 7 * 4, TINY_DIT.dim, seed=6), rand(1, 8, 3, TINY_DIT.dim, seed=7)
    by_frame = pose.unflatten(1, (7, 4))
    parts = []
    for frames, weights in CUTS:
        places = [0, *(frame + 1 for frame in frames)]
        motion = AnimateMotion(adapter, by_frame[:, frames].flatten(1, 2), face[:, places])
        velocity = dit(WITH_LEAD[:, :, places], SIGMA, PROMPT, extensions=[FramePositions(tuple(places)), motion])
        parts.append((places, [1, *weights], velocity))
    found = windowed(
        pipeline(dit, animate_adapter=adapter),
        WITH_LEAD,
        SlidingWindow(4, 2, prefix_frames=1),
        prompt_embeds=PROMPT,
        animate_motion=AnimateMotion(adapter, pose, face),
    )
    assert torch.allclose(found, blended(parts, 8), atol=1e-5)


@torch.no_grad()
def test_animate_2_is_cut_and_every_window_reads_its_own_part_of_the_reference():
    """Only the first window has the last frames of the previous clip, so only there `log_scale` applies."""
    dit = drawn(WanDiT(replace(TINY_DIT, in_channels=36, reference_video=True)))
    reference, condition = rand(1, 16, 7, 4, 4, seed=6), rand(1, 20, 8, 4, 4, seed=7)
    parts = []
    for frames, weights in CUTS:
        video, places = ReferenceKVCache(), [0, *(frame + 1 for frame in frames)]
        clean = reference[:, :, frames]
        given = torch.cat([torch.ones(1, 4, *clean.shape[2:]), clean], dim=1)
        read = [FramePositions(tuple(frames)), RecordReference(video)]
        dit(clean, torch.tensor([REFERENCE_TIME]), PROMPT, None, given, extensions=read)
        follow = [
            FramePositions(tuple(places)),
            ReferenceAttention(video, -1.3 if 0 in frames else 0.0, frozenset({1})),
        ]
        velocity = dit(WITH_LEAD[:, :, places], SIGMA, PROMPT, None, condition[:, :, places], extensions=follow)
        parts.append((places, [1, *weights], velocity))
    sliding_window = SlidingWindow(4, 2, prefix_frames=1)
    windows = cache_reference_video(
        dit,
        reference_latents=reference,
        reference_prompt_embeds=PROMPT,
        sliding_window=sliding_window,
        video_shape=SimpleNamespace(latent_size=(7, 4, 4)),
    )
    found = windowed(
        pipeline(dit),
        WITH_LEAD,
        sliding_window,
        prompt_embeds=PROMPT,
        condition_latents=condition,
        reference_attention=ReferenceAttention(windows[0], -1.3, frozenset({1}), windows),
    )
    assert torch.allclose(found, blended(parts, 8), atol=1e-5)


@torch.no_grad()
def test_a_given_frame_is_clean_in_its_windows_and_stays():
    """TI2V: only windows with the first frame have one time per frame."""
    dit = drawn(WanDiT(replace(TINY_DIT, frame_times=True)))
    first = rand(1, 16, 1, 4, 4, seed=6)
    parts = []
    for frames, weights in CUTS:
        latents, time = LATENTS[:, :, frames].clone(), SIGMA[:, None].repeat(1, len(frames))
        if 0 in frames:
            latents[:, :, :1], time[:, 0] = first, 0
        velocity = dit(latents, time, PROMPT, extensions=[FramePositions(tuple(frames))])
        if 0 in frames:
            velocity[:, :, 0] = 0
        parts.append((frames, weights, velocity))
    found = windowed(pipeline(dit), LATENTS, SlidingWindow(4, 2), prompt_embeds=PROMPT, first_latents=first)
    assert torch.allclose(found, blended(parts, 7), atol=1e-4)
    assert not found[:, :, 0].any()


def test_a_window_as_long_as_the_video_changes_no_bit():
    pipe = WanVideoPipeline.from_components(
        **shared_parts()[1], dit=our_dit(oracle_dit()), device="cpu", torch_dtype=torch.float32
    )
    call = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 2, "seed": 0, "output_type": "latents"}
    plain = pipe("a puppy", **call)
    assert torch.equal(pipe("a puppy", **call, sliding_window_size=4, sliding_window_stride=2), plain)
    shorter = pipe("a puppy", **call, sliding_window_size=3, sliding_window_stride=2)
    assert parity.relative_error(shorter, plain) > 1e-3
    assert parity.relative_error(shorter, plain) < 1


def test_a_call_tells_windows_of_the_frames_in_front(monkeypatch):
    dit, vace = our_vace(oracle_vace_dit())
    pipe = WanVideoPipeline.from_components(
        **shared_parts()[1], dit=dit, vace=vace, device="cpu", torch_dtype=torch.float32
    )
    seen = []
    embed = dit.embed
    monkeypatch.setattr(dit, "embed", lambda latents, *given: seen.append(latents.shape[2]) or embed(latents, *given))
    call = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 1, "cfg_scale": 1.0, "seed": 0}
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    cut = {"sliding_window_size": 3, "sliding_window_stride": 2, "output_type": "latents"}
    latents = pipe("a puppy", **call, vace_reference_image=images, **cut)
    assert latents.shape[2] == 2 + 4
    assert seen == [2 + 3, 2 + 2]
    assert latents.isfinite().all()


class Watched(nn.Module):
    """A network that records the sizes of its inputs, and how many of its results are alive."""

    config = WanDiTConfig()

    def __init__(self) -> None:
        super().__init__()
        self.most, self.alive, self.results = 0, 0, []

    def forward(self, latents, *given, **named):
        self.most = max(self.most, latents.shape[2])
        self.alive = max(self.alive, sum(result() is not None for result in self.results))
        result = latents * 1
        self.results.append(weakref.ref(result))
        return result


def test_one_window_is_in_memory_however_many_there_are():
    seen = []
    for frames in (9, 41):
        dit = Watched()
        windowed(pipeline(dit), torch.zeros(1, 16, frames, 4, 4), SlidingWindow(4, 2), prompt_embeds=PROMPT)
        seen.append((dit.most, dit.alive))
    assert len(dit.results) == 20
    assert seen[0] == seen[1] == (4, 0)


@unit("painted_stripes")
def paint_stripes(*, stripes: int = 0):
    """A unit of a feature that does not declare how its condition is cut."""
    return (lambda dit, stream: stream) if stripes else None


class Striped(WanVideoPipeline):
    """Pipeline with one more feature."""

    features = (
        *WanVideoPipeline.features,
        Feature("stripes", units=(paint_stripes,), conditions={"painted_stripes": Condition()}),
    )


LONG = {"height": 32, "width": 32, "num_frames": 33}
CUT = {"sliding_window_size": 4, "sliding_window_stride": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sliding_window_size": 4}, "sliding_window_stride=None.*give both"),
        ({"sliding_window_stride": 4}, "sliding_window_size=None.*give both"),
        (
            {"sliding_window_size": 0, "sliding_window_stride": 1},
            "sliding_window_size=0: expected an integer of at least 1",
        ),
        ({"sliding_window_size": 4, "sliding_window_stride": 5}, "leaves gaps"),
        (CUT | {"step_cache": "first_block:threshold=0.1"}, "step_cache=.*sliding_window_size"),
        (CUT | {"stripes": 3}, "unit 'paint_stripes' writes 'painted_stripes', which sliding windows cannot cut"),
    ],
)
def test_refused_before_anything_runs(arguments, message):
    pipe = pipeline(WanDiT(TINY_DIT), Striped)
    with pytest.raises(ValueError, match=message):
        pipe.check(prompt="a puppy", **LONG | arguments)


def test_what_is_not_used_or_not_cut_is_not_refused():
    pipe = pipeline(WanDiT(TINY_DIT), Striped)
    assert pipe.check(prompt="a puppy", **LONG, **CUT).values["stripes"] == 0
    pipe.check(prompt="a puppy", **LONG, sliding_window_size=9, sliding_window_stride=9, stripes=3)
