"""Two experts on a device with streams: the second replaces the first block by block, with no wrong weight and with no
more memory than the larger one takes. Without streams nothing is prefetched.
"""

from __future__ import annotations

import ctypes
import weakref

import pytest
import torch
from torch import nn

from diffsynth.core.device import backends
from diffsynth.core.planning import MemoryPlan, Speeds, StageCost, StageKind, Workload, plan_memory
from diffsynth.core.vram import Policy, wrap
from diffsynth.core.vram.loaded_modules import loaded_modules
from diffsynth.runtime.stage_offloader import ExpertSwitcher, StageOffloader
from slow_device import LockedTensor, SlowDevice

CUDA = torch.device("cuda", 0)
SIZE, BLOCKS, PASSES = 512, 5, 2


class Allocator:
    """An allocator that reuses memory of a `SlowDevice` before the device has finished with it, as torch's does."""

    def __init__(self, slow: SlowDevice) -> None:
        self.slow, self.free, self.used, self.peak = slow, {}, 0, 0
        self.every: list[torch.Tensor] = []

    def give(self, size: int) -> torch.Tensor:
        pool = self.free.setdefault(size, [])
        if pool:
            whole = pool.pop()
        else:
            whole = self.slow.tensor(size)
            self.every.append(whole)
        self.used += size
        self.peak = max(self.peak, self.used)
        lent = whole[:].of(self.slow)
        weakref.finalize(lent, self._take, whole)
        return lent

    def _take(self, whole: torch.Tensor) -> None:
        self.used -= whole.numel()
        self.free[whole.numel()].append(whole)


@pytest.fixture(params=["main", "side", "either"])
def device(request, monkeypatch):
    """A device whose memory comes from an `Allocator`; host memory reports that it is pinned."""
    slow = SlowDevice(prefer=request.param)
    slow.allocator = Allocator(slow)
    monkeypatch.setattr(backends, "torch_module", {"cuda": slow}.get)
    allocate = torch.empty

    def empty(*size, device=None, pin_memory=False, **options):
        if device is not None and torch.device(device).type == "cuda":
            return slow.allocator.give(*size)
        memory = allocate(*size, device=device, **options)
        return memory.as_subclass(LockedTensor) if pin_memory else memory

    monkeypatch.setattr(torch, "empty", empty)
    yield slow
    loaded_modules(CUDA).offload_all()


class Block(nn.Module):
    """Reads its weights when the device gets to it."""

    def __init__(self, slow: SlowDevice, number: int, wrong: list) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((SIZE,), number, dtype=torch.uint8), requires_grad=False)
        self.slow, self.number, self.wrong = slow, number, wrong

    def forward(self) -> None:
        # The address alone: a reference to the memory would keep it.
        address, number, wrong = self.weight.data_ptr(), self.number, self.wrong

        def compute() -> None:
            found = set(ctypes.string_at(address, SIZE))
            if found != {number}:
                wrong.append((number, found))

        self.slow.submit(compute)


class Expert(nn.Module):
    def __init__(self, slow: SlowDevice, first: int, wrong: list) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(slow, first + number, wrong) for number in range(BLOCKS))

    def forward(self) -> None:
        for block in self.blocks:
            block()


class Call:
    """A loop of two experts; `sent` is the bytes of the second that were copied before its first step."""

    def __init__(self, slow: SlowDevice, *, resident: int = BLOCKS) -> None:
        self.slow, self.wrong, self.sent = slow, [], None
        experts = {role: Expert(slow, first, self.wrong) for role, first in (("dit", 1), ("dit2", 101))}
        policy = Policy.preset("cpu-offload", CUDA)
        self.managed = {role: wrap(one, policy, repeated=("blocks",), smallest=0) for role, one in experts.items()}
        for one in self.managed.values():
            one.configure(resident=None if resident == BLOCKS else one.blocks[:resident], slots=2)
        self.experts = experts
        self.offloader = StageOffloader(experts, CUDA)

    def plan(self, steps: list[str], limit: float) -> MemoryPlan:
        """Return a plan of the loop without activations, limited to so many bytes."""
        loads = tuple(one.footprint(role) for role, one in self.managed.items())
        stages = tuple(
            StageCost(StageKind.DENOISE, f"denoise ({load.role})", (load.role,), 0, steps=steps.count(load.role))
            for load in loads
        )
        speeds = Speeds(link=1.0, compute=1.0, disk=1.0)
        return plan_memory(Workload(loads, stages), vram_limit=limit / 2**30, speeds=speeds)

    def play(self, steps: list[str], *, passes: dict[int, int] | None = None, plan: MemoryPlan | None = None) -> Call:
        second = self.managed["dit2"]
        with ExpertSwitcher(self.offloader, [(role,) for role in steps], plan) as experts:
            for step, role in enumerate(steps):
                if role == "dit2" and self.sent is None:
                    self.sent = second.report.bytes_moved
                experts.begin_step()
                for _ in range((passes or {}).get(step, PASSES)):
                    self.experts[role]()
        self.offloader.end_call(plan)
        self.slow.synchronize()
        return self


STEPS = ["dit"] * 3 + ["dit2"] * 2


@pytest.mark.parametrize("resident", [BLOCKS, 3, 1, 0])
def test_the_second_is_there_when_the_first_has_ended(device, resident):
    call = Call(device, resident=resident).play(STEPS)
    assert call.wrong == []
    assert call.sent == resident * SIZE
    assert device.allocator.peak == (BLOCKS if resident == BLOCKS else resident + 2) * SIZE
    assert device.allocator.used == 0


@pytest.mark.parametrize("steps", [STEPS, ["dit", "dit2", "dit2"]])
@pytest.mark.parametrize("blocks", [1.5, 3, 4, 5.5, 7, 9, 10])
def test_prefetched_bytes_are_those_planned_and_the_limit_is_kept(device, blocks, steps):
    call, limit = Call(device), blocks * SIZE + 1
    plan = call.plan(steps, limit)
    call.play(steps, plan=plan)
    assert call.wrong == []
    assert device.allocator.peak <= limit
    kept = 0 if "dit2" in plan.evicted else BLOCKS * SIZE  # comes once, whichever call it is
    assert call.sent == plan.loop[1].bytes_ahead + kept


@pytest.mark.parametrize("broken", ["copies do not wait", "computation does not wait"])
def test_a_missing_wait_is_seen(device, broken, monkeypatch):
    """The device of this file finds what it is there to find, in one of its orders."""
    call = Call(device)
    if broken == "copies do not wait":
        monkeypatch.setattr("diffsynth.core.device.streams.OverlappingStream.wait_event", lambda self, event: None)
        found_by = "side"
    else:
        monkeypatch.setattr("diffsynth.core.device.wait_event", lambda event, device: None)
        found_by = "main"
    call.play(STEPS)
    assert device.prefer == "either" or (call.wrong != []) == (device.prefer == found_by)


def test_the_host_waits_for_nothing(device, monkeypatch):
    done, go_on = [], device.go_on
    monkeypatch.setattr(device, "go_on", lambda enough: (done.append(enough), go_on(enough)))
    Call(device).play(STEPS)
    assert len(done) == 1  # that of this test's own end


def test_one_step_of_the_first_tells_nothing_of_the_next(device):
    """Nobody knows how often its blocks will run, so they stay, and nothing takes their place."""
    call = Call(device).play(["dit", "dit2", "dit2"])
    assert (call.wrong, call.sent) == ([], 0)
    assert device.allocator.peak == BLOCKS * SIZE


@pytest.mark.parametrize(("passes", "moved"), [(1, BLOCKS), (3, 2 * BLOCKS)])
def test_a_wrong_guess_costs_time_and_no_memory(device, passes, moved):
    """With a pass less the blocks are still waited for; with one more the second gives its place back."""
    call = Call(device).play(STEPS, passes={2: passes})
    assert call.wrong == []
    assert device.allocator.peak == BLOCKS * SIZE
    assert call.managed["dit2"].report.bytes_moved == moved * SIZE


def test_a_call_that_ends_early_leaves_nothing_behind(device):
    call = Call(device)
    with ExpertSwitcher(call.offloader, [("dit",), ("dit",), ("dit2",)], None) as experts:
        for blocks in (call.experts["dit"].blocks, call.experts["dit"].blocks[:2]):
            experts.begin_step()
            for block in blocks:
                block()
        assert call.managed["dit2"].device_bytes == 2 * SIZE
    call.offloader.end_call(None)
    device.synchronize()
    assert device.allocator.used == 0
    assert call.play(STEPS).wrong == []


def test_pageable_memory_is_not_prefetched(device, monkeypatch):
    """The host would have to stay for it."""
    monkeypatch.setattr(LockedTensor, "is_pinned", lambda self, device=None: False)
    call = Call(device).play(STEPS)
    assert (call.wrong, call.sent) == ([], 0)


def test_nothing_is_prefetched_on_the_cpu():
    first, second = (nn.Linear(4, 4).requires_grad_(False) for _ in range(2))
    wrapped = [wrap(one, Policy.preset("cpu-offload", "cpu"), smallest=0) for one in (first, second)]
    assert wrapped[1].prefetchable() == []
