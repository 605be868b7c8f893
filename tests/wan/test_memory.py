"""Memory policies change no bit of the results of Wan's networks, although extensions call single modules."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import parity
from diffsynth.core.vram import Policy, wrap
from diffsynth_wan import WanVideoPipeline
from diffsynth_wan.checkpoints import ARCHITECTURES
from diffsynth_wan.dit import WanDiT
from diffsynth_wan.extension import Extension
from diffsynth_wan.features.camera import CameraMotion
from diffsynth_wan.features.control import ReferenceFrame
from diffsynth_wan.tiny import TINY_ANIMATE, TINY_DIT, TINY_VACE, tiny_animate_inputs, tiny_dit_inputs
from diffsynth_wan.variants.animate import AnimateMotion, WanAnimateAdapter
from diffsynth_wan.variants.vace import VaceControl, WanVace
from wan_oracles import oracle_dit, our_dit, shared_parts

REPEATED = {spec.module.partition(":")[2]: spec.repeated_blocks for spec in ARCHITECTURES}


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def drawn(module: nn.Module) -> nn.Module:
    module.load_state_dict(parity.draw_weights(parity.shapes_of(module)) | dict(module.named_buffers()))
    return module.eval().requires_grad_(False)


def network(case: str) -> tuple[list[nn.Module], list[Extension]]:
    config = replace(TINY_DIT, num_layers=4)
    if case == "camera":
        return [drawn(WanDiT(replace(config, camera_channels=24)))], [CameraMotion(rand(2, 24, 3, 48, 64))]
    if case == "reference":
        return [drawn(WanDiT(replace(config, reference_channels=16)))], [ReferenceFrame(rand(2, 16, 6, 8))]
    dit = drawn(WanDiT(config))
    if case == "vace":
        vace = drawn(WanVace(replace(TINY_VACE, num_layers=2)))
        return [dit, vace], [VaceControl(vace, rand(2, 96, 3, 6, 8))]
    adapter = drawn(WanAnimateAdapter(replace(TINY_ANIMATE, num_layers=2)))
    faces = tiny_animate_inputs(TINY_ANIMATE, torch.Generator().manual_seed(0))["face_pixels"]
    return [dit, adapter], [AnimateMotion(adapter, *adapter(rand(1, 16, 2, 6, 8), faces))]


def test_a_plan_reckons_with_tiles_which_are_on_unless_a_call_says_otherwise() -> None:
    parts = shared_parts()[1] | {"dit": our_dit(oracle_dit(0))}
    pipe = WanVideoPipeline.from_components(**parts, device="cpu", torch_dtype=torch.float32)
    call = {"height": 64, "width": 96, "num_frames": 1, "num_inference_steps": 1, "prompt": "a"}
    tiles = {"tile_size": (4, 6), "tile_stride": (3, 4)}
    tiled, whole = (pipe.plan(**call, **tiles, **more, device="cuda") for more in ({}, {"tiled": False}))
    assert [plan.switches for plan in (tiled, whole)] == [{}, {}]
    assert tiled.stages[-1].activations < 0.7 * whole.stages[-1].activations


@pytest.mark.parametrize("preset", ["none", "cpu-offload"])
@pytest.mark.parametrize("case", ["camera", "reference", "vace", "animate"])
@torch.no_grad()
def test_no_bit_changes(case: str, preset: str) -> None:
    modules, extensions = network(case)
    inputs = tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(0)) | {"latents": rand(2, 16, 3, 6, 8)}
    truth = modules[0](**inputs, extensions=extensions)
    wrapped = [
        wrap(module, Policy.preset(preset, "cpu"), repeated=REPEATED[type(module).__name__], smallest=0)
        for module in modules
    ]
    with ExitStack() as stack:
        for one in wrapped:
            stack.enter_context(one)
        for _ in range(2):
            assert torch.equal(modules[0](**inputs, extensions=extensions), truth)
