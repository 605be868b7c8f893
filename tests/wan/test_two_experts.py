"""Two experts: the plan counts one of them at a time, and the loop has one on the device at a time."""

from __future__ import annotations

import pytest
import torch

from diffsynth.core.vram import Policy, wrap
from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.policy import BlockState
from diffsynth_wan import WanVideoPipeline
from wan_oracles import oracle_dit, our_dit, shared_parts

CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 0}
"""Noise levels are 1, 0.909 and 0.714: with the boundary at 0.8, the second expert runs in the last step."""


def pipeline(experts: int = 2) -> WanVideoPipeline:
    names = ("dit", "dit2")[:experts]
    dits = {name: our_dit(oracle_dit(seed)) for seed, name in enumerate(names)}
    return WanVideoPipeline.from_components(**shared_parts()[1], **dits, device="cpu", torch_dtype=torch.float32)


def test_the_plan_needs_room_for_one_expert():
    pipe = pipeline()
    plan = pipe.plan(device="cuda", policy="cpu-offload", prompt="a", switch_DiT_boundary=0.8, **CALL)
    first, second = plan.loop
    assert "dit" in first.roles
    assert "dit2" not in first.roles
    assert "dit2" in second.roles
    assert "dit" not in second.roles
    assert (first.steps, second.steps) == (2, 1)
    assert 0.8 < second.bytes_ahead / second.bytes_once < 1  # all weights except those outside of blocks
    one = pipeline(1).plan(device="cuda", policy="cpu-offload", prompt="a", **CALL)
    assert first.vram == second.vram == pytest.approx(one.loop[0].vram, rel=0.01)


def test_one_expert_is_there_at_a_time_and_the_second_is_told_a_step_ahead(monkeypatch):
    pipe = pipeline()
    call = CALL | {"prompt": "a", "switch_DiT_boundary": 0.8, "output_type": "latents"}
    plain = pipe(**call)
    for role, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            wrap(part, Policy.preset("cpu-offload", "cpu"), smallest=0)
            assert managed(part) is not None, role
    moved = WanVideoPipeline.from_components(**pipe.components, device="cpu", torch_dtype=torch.float32)
    events = []
    for role in ("dit", "dit2"):
        expert = managed(pipe.components[role])
        monkeypatch.setattr(expert, "prepare", lambda role=role: events.append(f"prepare {role}"))

    def on_step(step):
        there = [r for r in ("dit", "dit2") if managed(pipe.components[r]).state is not BlockState.OFFLOAD]
        events.append(f"step {step.index} of {'+'.join(there)}")

    assert torch.equal(moved(**call, on_step=on_step), plain)
    assert events == ["step 0 of dit", "prepare dit2", "step 1 of dit", "step 2 of dit2"]


def test_a_step_cache_serves_both_experts():
    """The second one was computed whole in every step. The first step of an expert reuses nothing."""
    pipe, reused, runs = pipeline(), [], {"dit": 0, "dit2": 0}

    def count(role):
        return lambda *_: runs.__setitem__(role, runs[role] + 1)

    handles = [pipe.components[role].blocks[-1].ffn.register_forward_hook(count(role)) for role in runs]
    call = CALL | {"prompt": "a", "num_inference_steps": 6, "cfg_scale": 1.0, "switch_DiT_boundary": 0.8}
    call |= {"output_type": "latents", "on_step": lambda step: reused.append(bool(step.reused))}
    pipe(**call, step_cache="first_block:threshold=100")
    for handle in handles:
        handle.remove()
    assert reused == [False, True, True, True, False, True]
    assert runs == {"dit": 1, "dit2": 1}
