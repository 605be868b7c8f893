"""A limit decides for each call which blocks stay on the device and which are streamed; it is never exceeded."""

from __future__ import annotations

import pytest
import torch

import diffsynth
from diffsynth.core.vram.managed import managed
from diffsynth.errors import NotEnoughMemory
from diffsynth.runtime.progress import no_progress
from limited import device_bytes, keep_limit, let_blocks_travel

CALL = {
    "num_inference_steps": 2,
    "height": 128,
    "width": 128,
    "cfg_scale": 2.0,
    "seed": 3,
    "output_type": "tensor",
    "progress_bar_cmd": no_progress,
}
MODULES = ("dit", "text_encoder", "vae")


@pytest.fixture(autouse=True)
def every_block_travels(monkeypatch):
    let_blocks_travel(monkeypatch, smallest=2**16)


@pytest.fixture(scope="module")
def free():
    return diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(free):
    return free("a red apple", **CALL)


def limited(gib):
    """The CPU in place of a device with so much memory; weights on disk, so that offloaded blocks take no memory."""
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32, policy="disk")
    keep_limit(pipe, gib)
    return pipe


def plan_of(pipe, call):
    return pipe.plan_cache.plan(pipe.check(**call), call)


@pytest.fixture
def most(monkeypatch):
    with device_bytes(monkeypatch) as seen:
        yield seen


def whole(pipe):
    return {role: managed(pipe.components[role]).footprint(role).whole for role in MODULES}


def test_with_room_for_all_nothing_leaves(expected):
    pipe = limited(8)
    for _ in range(2):
        assert torch.equal(pipe("a red apple", **CALL), expected)
    moved = {role: report.bytes_moved for role, report in pipe.transfers.items()}
    sizes = whole(pipe)
    assert all(moved[role] <= sizes[role] for role in MODULES), "each is copied to the device once, for both calls"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_limit_is_kept_and_changes_no_bit(expected, most, share):
    pipe = limited(1)
    plan = plan_of(pipe, CALL)
    least, all_of_it = plan.smallest_vram, sum(whole(pipe).values()) + max(stage.activations for stage in plan.stages)
    limit = least + share * (all_of_it - least)
    keep_limit(pipe, limit / 2**30)
    assert torch.equal(pipe("a red apple", **CALL), expected)
    plan = plan_of(pipe, CALL)
    assert plan.peak_vram <= limit
    for role in MODULES:
        part = managed(pipe.components[role])
        lines = [line for line in plan.stages if role in line.roles]
        assert most[part] <= max(line.vram - line.activations for line in lines)


def test_no_memory_at_all_is_the_least_there_is(expected, most):
    pipe = limited(0)
    assert torch.equal(pipe("a red apple", **CALL), expected)
    plan = plan_of(pipe, CALL)
    assert not any(component.resident for stage in plan.stages for component in stage.components)
    assert most[managed(pipe.dit)] < whole(pipe)["dit"]
    assert all(managed(pipe.components[role]).device_bytes == 0 for role in MODULES)


def test_a_limit_that_cannot_be_kept_is_refused_before_running(most):
    pipe = limited(0.001)
    with pytest.raises(NotEnoughMemory, match=r"vram_limit=0\.001 GiB is too small.* smallest limit .* is \d"):
        pipe("a red apple", **CALL)
    assert not most


def test_equal_calls_share_a_plan():
    pipe = limited(8)
    plans = keep_limit(pipe, 8)
    pipe("a red apple", **CALL)
    pipe("something else", on_step=lambda step: None, **{**CALL, "seed": 4})
    assert len(plans) == 1
    pipe("a red apple", **{**CALL, "height": 64})
    pipe(["one", "two"], **CALL)
    assert len(plans) == 3


def test_plans_are_made_anew_after_they_were_cleared():
    pipe = limited(8)
    plans = keep_limit(pipe, 8)
    pipe("a red apple", **CALL)
    pipe.plan_cache.clear()
    pipe("a red apple", **CALL)
    assert [plan.peak_vram for plan in plans] == [plans[0].peak_vram] * 2
