"""Several processes compute the result of one: every variant, uneven tokens and heads, whole calls of a pipeline.

Networks, inputs and the results of one process are computed once, before the processes are forked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import parity
from diffsynth.core.parallel import LONE_PROCESS, MeshAxis, create_mesh
from diffsynth.errors import Refused, Unavailable
from diffsynth.runtime.pipeline import Pipeline
from diffsynth_wan import WanVideoPipeline
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.dit import WanDiT
from diffsynth_wan.extension import Extension, Stream
from diffsynth_wan.features.camera import CameraMotion
from diffsynth_wan.features.control import ReferenceFrame
from diffsynth_wan.sharding import ShardTokens, local_groups, with_sharded_tokens
from diffsynth_wan.text_encoder import WanTextEncoder
from diffsynth_wan.tiny import (
    TINY_ANIMATE,
    TINY_DIT,
    TINY_MOTION_CONTROLLER,
    TINY_TEXT_ENCODER,
    TINY_VACE,
    TINY_WAN22_AUTOENCODER,
    VOCAB_SIZE,
    tiny_animate_inputs,
    tiny_dit_inputs,
    tiny_tokenizer,
)
from diffsynth_wan.vae import Wan22Autoencoder
from diffsynth_wan.variants.animate import AnimateMotion, WanAnimateAdapter
from diffsynth_wan.variants.animate2 import RecordReference, ReferenceAttention, ReferenceKVCache
from diffsynth_wan.variants.speed import SpeedControl, WanMotionController
from diffsynth_wan.variants.vace import VaceControl, WanVace
from processes import run_together

WIDTH = {"dim": 384, "num_heads": 3}
"""Three heads: two processes have 2 and 1; with four processes, the last one has none."""

NARROW = replace(TINY_DIT, **WIDTH)
TOLERANCE = 1e-5

Run = Callable[[MeshAxis], Tensor]


def rand(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(module: torch.nn.Module, seed: int = 0) -> Any:
    constants = dict(module.named_buffers())
    module.load_state_dict(parity.draw_weights(parity.shapes_of(module), seed) | constants)
    return module.eval().requires_grad_(False)


def run_of(
    config: WanDiTConfig = NARROW, extensions: Sequence[Extension] = (), dit: WanDiT | None = None, **given: Any
) -> Run:
    """Return a forward pass over 3 x 3 x 2 tokens of two videos; 4 shards of 18 tokens are uneven and cut frames."""
    dit = drawn(WanDiT(config)) if dit is None else dit
    inputs = tiny_dit_inputs(config, torch.Generator().manual_seed(0)) | given
    return lambda axis: dit(**inputs, extensions=with_sharded_tokens(extensions, axis))


def image_to_video() -> Run:
    config = replace(NARROW, in_channels=36, image_dim=8)
    return run_of(
        config, latents=rand(2, 16, 3, 6, 4), condition_latents=rand(2, 20, 3, 6, 4), image_embeds=rand(2, 7, 8)
    )


def animate() -> Run:
    adapter = drawn(WanAnimateAdapter(replace(TINY_ANIMATE, **WIDTH)))
    faces = tiny_animate_inputs(TINY_ANIMATE, torch.Generator().manual_seed(0))["face_pixels"]
    return run_of(extensions=[AnimateMotion(adapter, *adapter(rand(1, 16, 2, 6, 4), faces))])


def animate_2() -> Run:
    """Return a pass with a recorded reference; each process stores all of its tokens for its own heads."""
    dit = drawn(WanDiT(NARROW))

    def run(axis: MeshAxis) -> Tensor:
        video = ReferenceKVCache()
        run_of(dit=dit, latents=rand(2, 16, 2, 6, 4), extensions=[RecordReference(video)])(axis)
        return run_of(dit=dit, extensions=[ReferenceAttention(video, -1.3)])(axis)

    return run


def everything_at_once() -> Run:
    """Return a pass with extensions that can be combined, in the order of the pipeline."""
    config = replace(NARROW, reference_channels=16, camera_channels=24)
    vace = drawn(WanVace(replace(TINY_VACE, **WIDTH)))
    controller = drawn(WanMotionController(replace(TINY_MOTION_CONTROLLER, dim=384)))
    camera, reference = CameraMotion(rand(2, 24, 3, 48, 32)), ReferenceFrame(rand(2, 16, 6, 4))
    speed = SpeedControl(controller(torch.tensor([40.0])))
    return run_of(config, [camera, reference, speed, VaceControl(vace, rand(2, 96, 3, 6, 4))])


RUNS: dict[str, Callable[[], Run]] = {
    "text to video": run_of,
    "image to video": image_to_video,
    "a time for each frame": lambda: run_of(time=rand(2, 3).sigmoid()),
    "a time for each token": lambda: run_of(time=rand(2, 18).sigmoid()),
    "VACE": lambda: run_of(
        extensions=[VaceControl(drawn(WanVace(replace(TINY_VACE, **WIDTH))), rand(2, 96, 2, 6, 4), scale=0.7)]
    ),
    "Animate": animate,
    "Animate-2": animate_2,
    "camera": lambda: run_of(replace(NARROW, camera_channels=24), [CameraMotion(rand(2, 24, 3, 48, 32))]),
    "all at once": everything_at_once,
}


class Parts:
    """Return a tiny TI2V pipeline, calls of it, and their results in one process."""

    def __init__(self) -> None:
        config = replace(NARROW, in_channels=48, out_channels=48, text_dim=32, frame_times=True)
        first, second = drawn(WanDiT(config)), drawn(WanDiT(config), seed=1)
        vace = drawn(WanVace(replace(TINY_VACE, in_channels=352, **WIDTH)))
        follower = drawn(WanDiT(replace(config, in_channels=100, frame_times=False, reference_video=True)))
        parts = {
            "text_encoder": drawn(WanTextEncoder(replace(TINY_TEXT_ENCODER, vocab_size=VOCAB_SIZE))),
            "tokenizer": tiny_tokenizer(),
            "vae": drawn(Wan22Autoencoder(TINY_WAN22_AUTOENCODER)),
            "device": "cpu",
            "torch_dtype": torch.float32,
        }
        self.pipe = WanVideoPipeline.from_components(dit=first, **parts)
        self.experts = WanVideoPipeline.from_components(dit=first, dit2=second, vace=vace, vace2=vace, **parts)
        self.follower = WanVideoPipeline.from_components(dit=follower, **parts)
        pixels = np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)
        size = {"height": 96, "width": 64, "num_frames": 9, "num_inference_steps": 2, "seed": 3}
        self.call = {"prompt": "an apple", "negative_prompt": "blurry", "output_type": "latents", **size}
        self.windows = {
            "num_frames": 17,
            "sliding_window_size": 3,
            "sliding_window_stride": 2,
            "num_inference_steps": 1,
        }
        self.image = {"input_image": Image.fromarray(pixels)}
        moves = [Image.fromarray(np.roll(pixels, 9 * turn, axis=0)) for turn in range(9)]
        self.dance = {"animate2_reference_image": moves[0], "animate2_reference_video": moves, "num_inference_steps": 1}

    def draw(self, **changes: Any) -> Any:
        return self.pipe(**self.call | changes)

    def follow(self) -> Any:
        """Animate-2: processes also record the reference video together."""
        return self.follower(**self.call | self.dance)

    def draw_with_experts(self) -> Any:
        """One step of each expert, with a reference image for VACE."""
        image = self.image["input_image"]
        return self.experts(**self.call, vace_reference_image=image, switch_DiT_boundary=0.9, cfg_scale=1.0)


@cache
def prepared() -> tuple[dict[str, Run], dict[str, Tensor], Parts, dict[str, Tensor]]:
    """Forward passes and calls of a pipeline, each with the result of one process."""
    runs = {name: make() for name, make in RUNS.items()}
    parts = Parts()
    with torch.no_grad():
        truths = {name: run(LONE_PROCESS) for name, run in runs.items()}
    drawn = {"text": parts.draw(), "image": parts.draw(**parts.image), "unguided": parts.draw(cfg_scale=1.0)}
    drawn["experts"] = parts.draw_with_experts()
    drawn["Animate-2"] = parts.follow()
    drawn["windows"] = parts.draw(**parts.windows, cfg_scale=1.0)
    return runs, truths, parts, drawn


@torch.no_grad()
def all_runs(rank: int) -> dict[str, float]:
    runs, truths, _, _ = prepared()
    mesh = create_mesh(device="cpu")
    return {name: parity.relative_error(run(mesh.tokens), truths[name]) for name, run in runs.items()}


def all_calls(rank: int) -> dict[str, float]:
    """Return the errors of a pipeline's calls, and the share of a forward pass that this process computed."""
    _, _, parts, truths = prepared()
    errors = {}
    tokens: list[int] = []
    parts.pipe.dit.blocks[0].register_forward_hook(lambda block, given, made: tokens.append(made.shape[1]))
    guided = {"text": {}, "image": parts.image}
    parts.pipe.parallel()
    size = parts.pipe.mesh.tokens.size
    for name, changes in (guided | {"unguided": {"cfg_scale": 1.0}}).items():
        errors[f"{name}, tokens"] = parity.relative_error(parts.draw(**changes), truths[name])
    assert len(tokens) == 2 * (2 + 2 + 1)
    assert max(tokens) <= -(-18 // size)
    with pytest.raises(Refused, match="step_cache"):
        parts.draw(step_cache="first_block:threshold=0.1")
    errors["windows, tokens"] = parity.relative_error(parts.draw(**parts.windows, cfg_scale=1.0), truths["windows"])
    parts.experts.parallel()
    errors["experts, tokens"] = parity.relative_error(parts.draw_with_experts(), truths["experts"])
    parts.follower.parallel()
    errors["Animate-2, tokens"] = parity.relative_error(parts.follow(), truths["Animate-2"])
    parts.follower.parallel(cfg=2)
    errors["Animate-2, branches"] = parity.relative_error(parts.follow(), truths["Animate-2"])
    tokens.clear()
    parts.pipe.parallel(cfg=2)
    for name, changes in guided.items():
        errors[f"{name}, branches"] = parity.relative_error(parts.draw(**changes), truths[name])
    assert len(tokens) == 2 * 2
    with pytest.raises(ValueError, match="computes the branches cond of guidance"):
        parts.draw(cfg_scale=1.0)
    unseeded = parts.draw(seed=None, cfg_scale=2.0)
    errors["unseeded"] = float(unseeded.double().sum())
    return errors


@pytest.mark.parametrize("size", [2, 4])
def test_every_variant(size: int) -> None:
    prepared()
    for errors in run_together(size, all_runs):
        assert set(errors) == set(RUNS)
        assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("size", [2, 4])
def test_calls_of_a_pipeline(size: int) -> None:
    """Processes share tokens, then branches and, if there are four, the tokens of each; all generate the same noise."""
    prepared()
    answers = run_together(size, all_calls)
    assert len({errors.pop("unseeded") for errors in answers}) == 1
    for errors in answers:
        assert len(errors) == 9
        assert max(errors.values()) < TOLERANCE, errors


def with_usp(rank: int) -> tuple[str, int, float]:
    """`from_pretrained(use_usp=True)` with a loader that returns given components."""
    _, _, parts, truths = prepared()
    given = []
    Pipeline.from_pretrained = lambda dtype, device, *rest, **more: given.append(str(device)) or parts.pipe
    pipe = WanVideoPipeline.from_pretrained(torch.float32, "cpu", use_usp=True)
    return given[0], pipe.mesh.tokens.size, parity.relative_error(parts.draw(), truths["text"])


def test_scripts_for_the_reference_share_tokens() -> None:
    prepared()
    for device, size, error in run_together(2, with_usp):
        assert (device, size) == ("cpu", 2)
        assert error < TOLERANCE


def test_without_torchrun_nothing_is_loaded() -> None:
    with pytest.raises(Unavailable, match="there is no process group"):
        WanVideoPipeline.from_pretrained(device="cpu", use_usp=True)
    with pytest.raises(Unavailable, match="there is no process group"):
        prepared()[2].pipe.parallel(cfg=2)


def test_a_variant_that_does_not_say_what_it_sees_is_named() -> None:
    def brighten(dit: WanDiT, stream: Stream) -> Stream:
        return stream

    two, speed = MeshAxis(None, 0, 2), SpeedControl(torch.zeros(0))
    assert with_sharded_tokens([brighten], LONE_PROCESS) == (brighten,)
    with pytest.raises(ValueError, match="brighten .*over 2 processes: token_scope is None"):
        with_sharded_tokens([speed, brighten], two)
    late = VaceControl(None, torch.zeros(0))
    with pytest.raises(ValueError, match="SpeedControl .*VaceControl"):
        with_sharded_tokens([late, speed], two)
    ordered = with_sharded_tokens([speed, late], two)
    assert [type(each) for each in ordered] == [SpeedControl, ShardTokens, VaceControl]


@torch.no_grad()
def test_fewer_tokens_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="18 tokens cannot be sharded over 19 processes"):
        run_of()(MeshAxis(None, 0, 19))


@pytest.mark.parametrize("own", [slice(0, 5), slice(5, 10), slice(6, 12), slice(7, 8), slice(3, 18), slice(0, 18)])
@pytest.mark.parametrize("groups", [1, 3, 18])
def test_runs_are_those_of_the_tokens(groups: int, own: slice) -> None:
    x = rand(2, groups, 4)
    mine = local_groups(x, own, 18)
    count = own.stop - own.start
    assert count % mine.shape[1] == 0
    of_each = x.repeat_interleave(18 // groups, dim=1)[:, own]
    assert torch.equal(mine.repeat_interleave(count // mine.shape[1], dim=1), of_each)
