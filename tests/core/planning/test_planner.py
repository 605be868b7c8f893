"""The planner: limits are kept, the cheapest is given up first, and the time of a step is predicted."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.core.planning import (
    BlockCall,
    BlockFootprint,
    BlockTiming,
    ComponentFootprint,
    Speeds,
    StageCost,
    StageKind,
    Workload,
    plan_memory,
    spread,
    step_seconds,
)
from diffsynth.core.planning.workload import GIB
from diffsynth.errors import NotEnoughMemory

SPEEDS = Speeds(link=25e9, compute=100e12, disk=3e9)


def component(role, gib, count, *, computed=1):
    size = int(gib * GIB / count)
    return ComponentFootprint(role, tuple(BlockFootprint(f"{role}.{i}", size, computed * size) for i in range(count)))


def block_calls(part, flops):
    return tuple(BlockCall(part.role, block.name, int(flops)) for block in part.blocks)


def workload(*, dit=12.0, text_encoder=8.0, act=1.5, decode=4.0, tiled=1.0, **changes):
    """Return a text-to-image call of about the size of FLUX.1."""
    parts = component("dit", dit, 38), component("text_encoder", text_encoder, 36), component("vae", 0.2, 1)
    stages = (
        StageCost(
            StageKind.PREPARE, "encode_prompt", ("text_encoder",), GIB // 5, block_calls=block_calls(parts[1], 1e10)
        ),
        StageCost(
            StageKind.DENOISE, "denoise", ("dit",), int(act * GIB), block_calls=block_calls(parts[0], 6e11), steps=8
        ),
        StageCost(
            StageKind.OUTPUT,
            "decode",
            ("vae",),
            int(decode * GIB),
            block_calls=block_calls(parts[2], 1e13),
            switched_activations=int(tiled * GIB),
        ),
    )
    return Workload(parts, stages, base_host_bytes=GIB // 2, switches={"tiled": True}, **changes)


def denoise(plan):
    return next(stage for stage in plan.stages if stage.name == "denoise")


def test_without_a_limit_everything_is_on_the_device_and_nothing_moves():
    plan = plan_memory(workload(), speeds=SPEEDS)
    assert plan.evicted == ()
    assert not plan.switches
    assert plan.peak_vram == pytest.approx((12 + 8 + 0.2 + 4) * GIB, rel=1e-6)
    assert [stage.bytes_per_step + stage.bytes_once for stage in plan.stages] == [0, 0, 0]
    assert plan.peak_ram == GIB // 2
    assert all(component.offloaded_to == "device" for stage in plan.stages for component in stage.components)


def test_a_call_without_stages_has_a_plan():
    """A pipeline without a loop and without networks has no stage that costs anything."""
    plan = plan_memory(Workload((), (), base_host_bytes=5), speeds=SPEEDS)
    assert (plan.stages, plan.smallest_vram, plan.smallest_ram) == ((), 0, 5)


def test_with_zero_nothing_stays_and_as_little_as_possible_is_taken():
    plan = plan_memory(workload(), vram_limit=0, speeds=SPEEDS)
    assert all(not component.resident for stage in plan.stages for component in stage.components)
    assert plan.peak_vram == plan.smallest_vram
    assert denoise(plan).components[0].slots == 1
    assert denoise(plan).bytes_per_step == pytest.approx(12 * GIB, rel=1e-6)


@given(st.floats(1.9, 30.0))
@settings(deadline=None)
def test_any_limit_is_kept_in_every_stage(limit):
    plan = plan_memory(workload(), vram_limit=limit, speeds=SPEEDS)
    assert plan.peak_vram <= limit * GIB
    for stage in plan.stages:
        for component in stage.components:
            assert {*component.resident, *component.streamed} == {
                block.name for block in workload().component(component.role).blocks
            }


def test_what_costs_least_is_given_up_first():
    evicted = {limit: plan_memory(workload(), vram_limit=limit, speeds=SPEEDS) for limit in (25, 17, 14, 8, 3)}
    assert evicted[25].evicted == ()
    assert evicted[17].evicted == ("text_encoder",)
    assert not denoise(evicted[14]).components[0].streamed
    assert denoise(evicted[8]).components[0].streamed
    assert not evicted[8].switches
    assert evicted[3].switches == {"tiled": True}


def test_more_memory_is_never_slower_and_never_moves_more():
    plans = [plan_memory(workload(), vram_limit=limit, speeds=SPEEDS) for limit in (2, 3, 4, 6, 8, 10, 12, 14, 24, 32)]
    for less, more in itertools.pairwise(plans):
        assert more.seconds_per_step <= less.seconds_per_step + 1e-9
        assert more.bytes_per_step <= less.bytes_per_step


def test_a_limit_that_cannot_be_kept_is_refused_with_the_smallest_that_can():
    with pytest.raises(NotEnoughMemory, match=r"denoise.* 1\.50 GiB.* 1\.82 GiB") as got:
        plan_memory(workload(), vram_limit=1.0, speeds=SPEEDS)
    smallest = float(str(got.value).split(" GiB; fewer")[0].rpartition(" ")[2])
    plan_memory(workload(), vram_limit=smallest, speeds=SPEEDS)
    with pytest.raises(NotEnoughMemory):
        plan_memory(workload(), vram_limit=smallest - 0.02, speeds=SPEEDS)


def narrow(wide):
    """Return the same call with weights of half the size, converted block by block."""
    parts = tuple(
        dataclasses.replace(
            part, blocks=tuple(BlockFootprint(each.name, each.stored // 2, each.stored) for each in part.blocks)
        )
        for part in wide.components
    )
    return dataclasses.replace(wide, components=parts, storage="float8_e4m3fn")


def slower(wide, factor):
    def slowed(stage):
        calls = tuple(dataclasses.replace(call, flops=factor * call.flops) for call in stage.block_calls)
        return dataclasses.replace(stage, block_calls=calls)

    return dataclasses.replace(wide, stages=tuple(map(slowed, wide.stages)))


@pytest.mark.parametrize(
    ("limit", "compute", "chosen"),
    [
        (None, 1, ""),
        (25, 1, ""),
        (14, 1, ""),
        (13, 1, ""),
        (8, 1, "float8_e4m3fn"),
        (8, 10, ""),
        (0, 1, "float8_e4m3fn"),
    ],
)
def test_weights_are_rounded_only_where_steps_become_faster(limit, compute, chosen):
    """With nearly everything on the device, or computing long enough to hide the copies, there is nothing to gain."""
    wide = slower(workload(act=1.5), compute)
    alone = [plan_memory(each, vram_limit=limit, speeds=SPEEDS) for each in (wide, narrow(wide))]
    plan = plan_memory(wide, narrow(wide), vram_limit=limit, speeds=SPEEDS)
    assert plan.storage == chosen
    assert [option.storage for option in plan.options] == ["", "float8_e4m3fn"]
    assert [option.seconds_per_step for option in plan.options] == [each.seconds_per_step for each in alone]
    assert dataclasses.replace(plan, options=()) == alone[bool(chosen)]
    assert plan.to_dict()["options"][1]["bytes_per_step"] == alone[1].bytes_per_step
    assert alone[0].options == ()


def test_what_does_not_fit_is_not_chosen_and_said():
    """A block is on the device in both dtypes while it is converted, so fp8 alone needs more than the wide dtype."""
    wide = workload(tiled=0.5)
    limit = (plan_memory(wide, vram_limit=0, speeds=SPEEDS).smallest_vram + 2**20) / GIB
    for offered in ((wide, narrow(wide)), (narrow(wide), wide)):
        plan = plan_memory(*offered, vram_limit=limit, speeds=SPEEDS)
        assert plan.storage == ""
        reasons = {option.storage: option.reason for option in plan.options}
        assert reasons[""] == ""
        assert "stored in float8_e4m3fn" in reasons["float8_e4m3fn"]
        assert "float8_e4m3fn: does not fit" in map(str, plan.options)
    with pytest.raises(NotEnoughMemory, match="denoise.*denoise stored in float8_e4m3fn"):
        plan_memory(wide, narrow(wide), vram_limit=1, speeds=SPEEDS)


def test_tiles_are_for_all_stages_of_a_call_or_for_none():
    """An image that is encoded in tiles too may take a little more so; what counts is what runs."""
    wide = workload()
    encode = StageCost(
        StageKind.PREPARE,
        "encode_image",
        ("vae",),
        GIB,
        block_calls=wide.stages[2].block_calls,
        switched_activations=int(1.1 * GIB),
    )
    call = dataclasses.replace(wide, stages=(encode, *wide.stages))
    roomy, tight = (plan_memory(call, vram_limit=limit, speeds=SPEEDS) for limit in (8, 3))
    assert [stage.switched for stage in roomy.stages] == [False] * 4
    assert [stage.switched for stage in tight.stages] == [True, False, False, True]
    assert [stage.activations for stage in tight.stages][::3] == [encode.switched_activations, GIB]
    assert tight.smallest_vram == roomy.smallest_vram


def test_weights_go_to_disk_where_host_memory_is_short_least_traffic_first():
    plan = plan_memory(workload(), vram_limit=8, ram_limit=16, speeds=SPEEDS)
    offloaded_to = {component.role: component.offloaded_to for stage in plan.stages for component in stage.components}
    assert offloaded_to == {"text_encoder": "disk", "dit": "host", "vae": "disk"}
    assert plan.peak_ram <= 16 * GIB
    with pytest.raises(NotEnoughMemory, match=r"ram_limit=0\.6 GiB"):
        plan_memory(workload(), vram_limit=8, ram_limit=0.6, speeds=SPEEDS)


def test_on_the_cpu_weights_and_activations_share_the_hosts_memory():
    plan = plan_memory(workload(on_host=True), speeds=SPEEDS)
    assert plan.peak_vram == 0
    assert plan.peak_ram == pytest.approx((0.5 + 20.2 + 4) * GIB, rel=1e-6)
    less = plan_memory(workload(on_host=True), ram_limit=8, speeds=SPEEDS)
    assert less.peak_ram <= 8 * GIB
    assert denoise(less).components[0].offloaded_to == "disk"


def test_resident_blocks_are_spread_evenly():
    assert sorted(spread(3, 9)) == [2, 5, 8]
    assert spread(0, 5) == frozenset()
    assert len(spread(5, 5)) == 5
    gaps = [b - a for a, b in zip(sorted(spread(13, 38)), sorted(spread(13, 38))[1:], strict=False)]
    assert set(gaps) <= {2, 3}


@pytest.mark.parametrize(
    ("limit", "steps", "blocks"), [(17, 6, 40), (14.5, 1, 1), (8, 6, None), (None, 6, 40), (0, 6, 0)]
)
def test_the_second_expert_takes_the_place_of_the_first(limit, steps, blocks):
    """Two of 12 GiB in 40 blocks: those that the plan keeps in place of others, and what fits beside them."""
    parts = component("dit", 12, 40), component("dit2", 12, 40)
    stages = [
        StageCost(
            StageKind.DENOISE,
            f"denoise ({part.role})",
            (part.role,),
            2 * GIB,
            block_calls=block_calls(part, 1e12),
            steps=number,
        )
        for part, number in zip(parts, (steps, 4), strict=True)
    ]
    plan = plan_memory(Workload(parts, tuple(stages)), vram_limit=limit, speeds=SPEEDS, offloads=True)
    first, second = plan.stages
    expected = len(second.components[0].resident) if blocks is None else blocks
    assert first.bytes_ahead == 0
    assert second.bytes_ahead == expected * parts[1].blocks[0].stored
    assert second.bytes_ahead <= second.bytes_once


def test_limits_below_zero_are_refused():
    with pytest.raises(ValueError, match="vram_limit=-1"):
        plan_memory(workload(), vram_limit=-1, speeds=SPEEDS)


times = st.floats(0.01, 1.0)


@given(times, times, st.integers(2, 40))
@settings(deadline=None)
def test_equal_blocks_take_as_long_as_the_closed_form_says(compute, copy, count):
    timings = [BlockTiming(compute, copy)] * count
    assert step_seconds(timings, slots=2) == pytest.approx(count * max(compute, copy), rel=1e-6)
    assert step_seconds(timings, slots=1) == pytest.approx(count * (compute + copy), rel=1e-6)


@given(times, times, st.integers(1, 10))
@settings(deadline=None)
def test_resident_blocks_between_streamed_ones_hide_copies(compute, copy, pairs):
    timings = [BlockTiming(compute), BlockTiming(compute, copy)] * pairs
    assert step_seconds(timings, slots=2) == pytest.approx(pairs * max(2 * compute, copy), rel=1e-6)


@given(st.lists(st.tuples(times, st.one_of(st.just(0.0), times)), min_size=1, max_size=20), st.integers(1, 4))
@settings(deadline=None)
def test_no_step_is_faster_than_its_computation_or_its_copies(pairs, slots):
    timings = [BlockTiming(*pair) for pair in pairs]
    least = max(sum(timing.compute for timing in timings), sum(timing.copy for timing in timings))
    most = sum(timing.compute + timing.copy for timing in timings)
    assert least - 1e-6 <= step_seconds(timings, slots=slots) <= most + 1e-6


def test_streaming_without_a_slot_is_refused():
    with pytest.raises(ValueError, match="0 slots"):
        step_seconds([BlockTiming(1.0, 1.0)], slots=0)
