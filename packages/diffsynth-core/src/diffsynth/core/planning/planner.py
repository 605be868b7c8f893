"""The planner: from the workload of a call and its limits to a memory plan.

What costs least is given up first. Components that a stage does not run leave the device. Then blocks of those that
run are streamed, as few as possible and spread over their depth. Then arguments are set that lower the memory at some
cost, such as tiles of the autoencoder, which may change its pixels. The dtype in which weights are stored is the
caller's to allow: of several workloads the first is taken, unless it does not fit or the steps of another one are
predicted to be faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from diffsynth.core.planning.plan import ComponentPlan, MemoryPlan, StagePlan, StorageOption
from diffsynth.core.planning.workload import (
    GIB,
    BlockCall,
    BlockFootprint,
    ComponentFootprint,
    Speeds,
    StageCost,
    StageKind,
    Workload,
    check_limit,
)
from diffsynth.errors import NotEnoughMemory

_SLOTS = (2, 3, 4)
"""Numbers of slots that are tried: one block computes while the others are copied."""

_MIN_GAIN = 0.05
"""Share by which steps must become faster for weights to be rounded: no prediction has the time of converting them."""

_STAGING_BUFFERS = 2
"""Host buffers between disk and device, each as large as the largest block."""

_WARM_UP_STEPS = 2
"""Steps after which the times of a step repeat, whatever was in the slots at first."""


def plan_memory(
    *workloads: Workload,
    vram_limit: float | None = None,
    ram_limit: float | None = None,
    speeds: Speeds,
    offloads: bool = False,
    disk: Sequence[str] = (),
) -> MemoryPlan:
    """Return the `MemoryPlan` of the first of `workloads` (the same call with weights stored in different dtypes) that
    fits the limits, or of a later one whose steps are predicted to be more than 5 % faster; raise NotEnoughMemory if
    none fits.

    Args:
        workloads: one call, with its weights stored in one dtype or another; the first is preferred. With several,
            `options` of the plan has the prediction for each.
        vram_limit: GiB on the device. None is no limit: nothing ever leaves the device. 0 keeps no block there and
            takes as little as possible. On the CPU `ram_limit` is the limit instead.
        ram_limit: GiB of host memory of the whole process; None is no limit.
        speeds: speeds of the machine, for times.
        offloads: components leave the device between stages even without a limit.
        disk: roles whose weights are stored on disk in any case; with `ram_limit` other roles may be, too.

    Raises:
        NotEnoughMemory: no workload fits; the message has the smallest limit that can be kept.
        ValueError: a limit is below 0.
    """
    check_limit("vram_limit", vram_limit)
    check_limit("ram_limit", ram_limit)
    plans: list[MemoryPlan] = []
    options: list[StorageOption] = []
    for workload in workloads:
        try:
            plan = _Planner(workload, vram_limit, ram_limit, speeds, offloads, frozenset(disk)).plan()
        except NotEnoughMemory as error:
            options.append(StorageOption(workload.storage, reason=str(error)))
        else:
            plans.append(plan)
            options.append(StorageOption(workload.storage, plan.seconds_per_step, plan.bytes_per_step))
    if not plans:
        raise NotEnoughMemory("; ".join(option.reason for option in options))
    chosen = plans[0]
    for plan in plans[1:]:
        # Rounding changes the output, so it must be worth it.
        if plan.seconds_per_step < (1 - _MIN_GAIN) * chosen.seconds_per_step:
            chosen = plan
    return replace(chosen, options=tuple(options) if len(options) > 1 else ())


def spread(count: int, of: int) -> frozenset[int]:
    """Return a frozenset of `count` indices from 0 to `of - 1`, spread evenly: {1, 3} for 2 of 4."""
    return frozenset(index for index in range(of) if (index + 1) * count // of > index * count // of)


@dataclass(frozen=True)
class BlockTiming:
    """Times of one call of a block.

    Args:
        compute: seconds of computation.
        copy: seconds of the copy of its weights, which must end before; 0 if the block is resident.
    """

    compute: float
    copy: float = 0.0


def step_seconds(timings: Sequence[BlockTiming], *, slots: int) -> float:
    """Return the time of a step in seconds, once steps take equal times, if weights of blocks are copied one at a time
    into `slots` buffers on the device.

    A copy begins when the link is free and a slot is; a slot is free when the block in it has computed. A block
    computes when the one before it has, and its weights are there. Equal blocks that are all streamed therefore take
    `max(copy, compute)` each with two slots or more, and `copy + compute` with one.

    Args:
        timings: block calls of one step, in order.
        slots: number of slots, at least 1 if any block is streamed.

    Raises:
        ValueError: a block is streamed, and there is no slot.
    """
    streamed = sum(timing.copy > 0 for timing in timings)
    if streamed and slots < 1:
        raise ValueError(f"{streamed} blocks are streamed through {slots} slots; expected 1 or more")
    computed = link = 0.0
    freed: list[float] = []
    ends = []
    for _ in range(_WARM_UP_STEPS + 2):
        for timing in timings:
            if timing.copy:
                slot = freed[-slots] if len(freed) >= slots else 0.0
                link = max(link, slot) + timing.copy
                computed = max(computed, link) + timing.compute
                freed.append(computed)
            else:
                computed += timing.compute
        ends.append(computed)
    return ends[-1] - ends[-2]


@dataclass(frozen=True)
class _StageLayout:
    """Resident blocks of the components of one stage, by role, and the number of slots for the others."""

    resident: dict[str, frozenset[str]]
    slots: int


class _Planner:
    """Plans one workload; see `plan_memory` for the arguments."""

    def __init__(
        self,
        workload: Workload,
        vram_limit: float | None,
        ram_limit: float | None,
        speeds: Speeds,
        offloads: bool,
        disk: frozenset[str],
    ) -> None:
        self._workload = workload
        self._vram_limit, self._ram_limit = vram_limit, ram_limit
        self._speeds = speeds
        self._offloads = offloads or vram_limit is not None
        self._loop_roles = {role for stage in workload.stages if stage.steps > 1 for role in stage.roles}
        self._disk = disk

    def plan(self) -> MemoryPlan:
        # Switches are arguments of the call, so all stages have them or none. They may change the result: only where
        # the limit cannot be kept without them, and they help.
        as_asked, switched = (self._minimum(workload) for workload in (self._workload, self._workload.switched()))
        smallest_vram = min(as_asked, switched)
        limit = self._device_limit()
        switches: Mapping[str, Any] = {}
        if limit is not None and limit < as_asked and switched < as_asked:
            self._workload, switches = self._workload.switched(), self._workload.switches
        if limit and limit < smallest_vram:
            raise NotEnoughMemory(self._too_small(limit, smallest_vram))
        staying = self._staying(limit)
        layouts = [self._layout(stage, staying, limit) for stage in self._workload.stages]
        self._disk |= self._moved_to_disk(layouts, staying)
        stages = [self._stage(*pair, staying) for pair in zip(self._workload.stages, layouts, strict=True)]
        return MemoryPlan(
            stages=self._with_bytes_ahead(stages, limit),
            vram_limit=self._vram_limit,
            ram_limit=self._ram_limit,
            smallest_vram=0 if self._workload.on_host else smallest_vram,
            smallest_ram=self._minimum_ram(),
            storage=self._workload.storage,
            evicted=tuple(each.role for each in self._workload.components if each.role not in staying),
            speeds=self._speeds,
            switches=switches,
        )

    def _device_limit(self) -> int | None:
        """Return the budget for weights and activations on the device that computes, in bytes; None is no limit, 0 is
        as little as possible.
        """
        if not self._workload.on_host:
            return None if self._vram_limit is None else int(self._vram_limit * GIB)
        if self._ram_limit is None:
            return None
        host_bytes = max((stage.host_bytes for stage in self._workload.stages), default=0)
        return max(int(self._ram_limit * GIB) - self._workload.base_host_bytes - host_bytes, 1)

    def _too_small(self, limit: int, smallest: int) -> str:
        stage = max(self._workload.stages, key=self._minimum_of_stage)
        on_host = self._workload.on_host
        name, value = ("ram_limit", self._ram_limit) if on_host else ("vram_limit", self._vram_limit)
        smallest += int((self._ram_limit or 0) * GIB) - limit if on_host else 0
        stored = f" stored in {self._workload.storage}" if self._workload.storage else ""
        return (
            f"{name}={value} GiB is too small for {stage.name}{stored}: its activations alone take "
            f"{stage.activations / GIB:.2f} GiB. The smallest limit that can be kept is "
            f"{_gib_rounded_up(smallest):.2f} GiB; fewer or smaller images, or a shorter video, take less"
        )

    def _minimum(self, workload: Workload) -> int:
        return max((self._minimum_of_stage(stage) for stage in workload.stages), default=0)

    def _minimum_of_stage(self, stage: StageCost) -> int:
        """Return the fewest bytes, an int, that a stage takes on the device: its activations, and its components with
        no resident block and one slot.
        """
        components = [self._workload.component(role) for role in stage.roles]
        return stage.activations + sum(component.on_device((), slots=1) for component in components)

    def _minimum_ram(self) -> int:
        base = self._workload.base_host_bytes
        if self._workload.on_host:
            stages = (self._minimum_of_stage(stage) + stage.host_bytes for stage in self._workload.stages)
            return base + max(stages, default=0)
        blocks = [block.stored for component in self._workload.components for block in component.blocks]
        host_bytes = max((stage.host_bytes for stage in self._workload.stages), default=0)
        return base + host_bytes + _STAGING_BUFFERS * max(blocks, default=0)

    def _staying(self, limit: int | None) -> frozenset[str]:
        """Return a frozenset of roles (component names), those that never leave the device: as many as fit `limit`;
        without a limit all, or none if components are to be offloaded.

        Without a limit these are all components, or none if `offloads` is set.

        Those of the loop are the last to go: they are the largest, and would have to be copied again for each call.
        """
        components = self._workload.components
        if limit is None:
            return frozenset() if self._offloads else frozenset(each.role for each in components)
        by_cost = sorted(components, key=lambda each: (each.role in self._loop_roles, -each.whole))
        for leaving in range(len(components) + 1):
            staying = frozenset(each.role for each in by_cost[leaving:])
            if all(
                self._room_beside(stage, staying, limit) >= self._needed_beside(stage, staying)
                for stage in self._workload.stages
            ):
                return staying
        return frozenset()

    def _needed_beside(self, stage: StageCost, staying: frozenset[str]) -> int:
        components = [self._workload.component(role) for role in stage.roles if role not in staying]
        if stage.steps > 1 and (self._loop_roles & staying) - set(stage.roles):
            # One expert does not stay at the price of streaming another in each of its steps.
            return sum(component.whole for component in components)
        return sum(component.on_device((), slots=_SLOTS[0]) for component in components) if staying else 0

    def _room_beside(self, stage: StageCost, staying: frozenset[str], limit: int) -> int:
        return limit - stage.activations - sum(self._workload.component(role).whole for role in staying)

    def _layout(self, stage: StageCost, staying: frozenset[str], limit: int | None) -> _StageLayout:
        """Return the `_StageLayout` (names of resident blocks, number of slots) that fits `limit` and has the fastest
        steps; of equally fast ones, the one with fewest slots.

        All blocks are resident if they fit, or without a limit; none is under a limit of 0.
        """
        components = [self._workload.component(role) for role in stage.roles]
        everything = {each.role: frozenset(block.name for block in each.blocks) for each in components}
        if limit is None:
            return _StageLayout(everything, 0)
        if limit == 0:
            return _StageLayout({role: frozenset() for role in stage.roles}, 1)
        least = {role: everything[role] if role in staying else frozenset[str]() for role in stage.roles}
        beside = sum(self._workload.component(role).whole for role in staying if role not in stage.roles)
        room = limit - beside - stage.activations
        if sum(component.whole for component in components) <= room:
            return _StageLayout(everything, 0)
        fitting: list[_StageLayout] = []
        for slots in (*_SLOTS, 1):
            # One slot hides no copy, so it is for limits that leave no room for two.
            if slots == 1 and fitting:
                break
            for resident in _shrinking(components, least):
                if sum(each.on_device(resident[each.role], slots=slots) for each in components) <= room:
                    fitting.append(_StageLayout(resident, slots))
                    break
        assert fitting, f"{stage.name}: nothing fits, though the limit is not below the minimum"
        return min(fitting, key=lambda one: (self._step_seconds(stage, one), one.slots))

    def _moved_to_disk(self, layouts: Sequence[_StageLayout], staying: frozenset[str]) -> frozenset[str]:
        """Return a frozenset of roles (component names): those whose weights must be stored on disk to keep the limit
        on host memory; empty if none must.

        Those with least traffic go first. Without a limit, and on the CPU, none does.

        Raises:
            NotEnoughMemory: the limit is too small even with all weights on disk.
        """
        if self._ram_limit is None or self._workload.on_host:
            return frozenset()
        limit = int(self._ram_limit * GIB)
        if limit < self._minimum_ram():
            raise NotEnoughMemory(
                f"ram_limit={self._ram_limit} GiB is too small: the process and its buffers take "
                f"{_gib_rounded_up(self._minimum_ram()):.2f} GiB even with all weights on disk"
            )
        traffic = dict.fromkeys((component.role for component in self._workload.components), 0)
        for stage, layout in zip(self._workload.stages, layouts, strict=True):
            for role in stage.roles:
                traffic[role] += self._bytes_once(role, layout, staying)
                traffic[role] += stage.steps * self._bytes_per_step(stage, layout, role)
        moved: set[str] = set()
        for role in sorted(traffic, key=lambda role: traffic[role]):
            if max(self._host_bytes(stage, self._disk | moved) for stage in self._workload.stages) <= limit:
                break
            moved.add(role)
        return frozenset(moved)

    def _stage(self, stage: StageCost, layout: _StageLayout, staying: frozenset[str]) -> StagePlan:
        resident, slots, on_host = layout.resident, layout.slots, self._workload.on_host
        components = {role: self._workload.component(role) for role in stage.roles}
        plans = tuple(
            ComponentPlan(
                role,
                tuple(block.name for block in component.blocks if block.name in resident[role]),
                streamed := tuple(block.name for block in component.blocks if block.name not in resident[role]),
                slots if streamed else 0,
                self._offloaded_to(role, staying),
                role in staying,
            )
            for role, component in components.items()
        )
        weights = sum(component.on_device(resident[role], slots=slots) for role, component in components.items())
        beside = sum(self._workload.component(role).whole for role in staying if role not in components)
        on_device = stage.activations + weights + beside
        return StagePlan(
            kind=stage.kind,
            name=stage.name,
            components=plans,
            activations=stage.activations,
            vram=0 if on_host else on_device,
            ram=self._host_bytes(stage, self._disk) + (on_device if on_host else 0),
            bytes_once=sum(self._bytes_once(role, layout, staying) for role in components),
            bytes_per_step=sum(self._bytes_per_step(stage, layout, role) for role in components),
            steps=stage.steps,
            seconds_per_step=self._step_seconds(stage, layout),
            switched=stage.is_switched,
        )

    def _with_bytes_ahead(self, stages: list[StagePlan], limit: int | None) -> tuple[StagePlan, ...]:
        """Return `stages` as a tuple of `StagePlan`s, with `bytes_ahead` set where the loop changes from one expert
        (network) to another.

        In the last step of an expert, blocks of the next one take the place of those that have run for the last time.
        Which call is the last is predicted from the step before; without one only free memory counts. See
        `OverlappedSwap`.
        """
        for index, (earlier, later) in enumerate(pairwise(stages), start=1):
            if not earlier.kind is later.kind is StageKind.DENOISE:
                continue
            incoming = [
                each
                for each in later.components
                if each.role not in earlier.roles and each.offloaded_to == "host" and not each.stays_on_device
            ]
            outgoing = [
                each for each in earlier.components if each.role not in later.roles and not each.stays_on_device
            ]
            room = max(limit - earlier.vram, 0) if limit else 0
            room += sum(self._resident_sizes(outgoing)) if earlier.steps > 1 else 0
            ahead = [copied for copied in accumulate(self._resident_sizes(incoming)) if copied <= room]
            stages[index] = replace(later, bytes_ahead=max(ahead, default=0))
        return tuple(stages)

    def _resident_sizes(self, components: Iterable[ComponentPlan]) -> Iterator[int]:
        """Yield the size of each resident block of `components`, as stored, in bytes, an int."""
        for component in components:
            resident = frozenset(component.resident)
            blocks = self._workload.component(component.role).blocks
            yield from (block.stored for block in blocks if block.name in resident)

    def _offloaded_to(self, role: str, staying: frozenset[str]) -> str:
        if role in self._disk or (self._workload.on_host and role not in staying):
            return "disk"
        return "host" if self._offloads and not self._workload.on_host else "device"

    def _host_bytes(self, stage: StageCost, disk: frozenset[str] | set[str]) -> int:
        """Return the host memory of a stage in bytes, an int: the process itself, live tensors, offloaded weights and
        buffers for reads from disk; if the CPU computes, only the first two.

        Weights count only if components are offloaded. On the CPU the caller adds weights and activations.
        """
        bytes_ = self._workload.base_host_bytes + stage.host_bytes
        if self._workload.on_host:
            return bytes_
        components = self._workload.components
        in_memory = [each.stored for each in components if self._offloads and each.role not in disk]
        read = [block.stored for each in components if each.role in disk for block in each.blocks]
        return bytes_ + sum(in_memory) + _STAGING_BUFFERS * max(read, default=0)

    def _bytes_once(self, role: str, layout: _StageLayout, staying: frozenset[str]) -> int:
        if role in staying:
            return 0
        component = self._workload.component(role)
        resident = layout.resident[role]
        return component.rest_stored + sum(block.stored for block in component.blocks if block.name in resident)

    def _bytes_per_step(self, stage: StageCost, layout: _StageLayout, role: str) -> int:
        sizes = self._streamed_sizes(role, layout)
        return sum(sizes.get(call.block, 0) for call in stage.block_calls if call.role == role)

    def _streamed_sizes(self, role: str, layout: _StageLayout) -> dict[str, int]:
        """Return a dict name of a streamed block -> bytes copied at each of its calls; empty if none is streamed or
        each has its own slot on the device.
        """
        resident = layout.resident[role]
        streamed = [block for block in self._workload.component(role).blocks if block.name not in resident]
        return {block.name: block.stored for block in streamed} if len(streamed) > layout.slots else {}

    def _step_seconds(self, stage: StageCost, layout: _StageLayout) -> float:
        streamed = {role: self._streamed_sizes(role, layout) for role in stage.roles}
        timings = [self._timing(call, streamed) for call in stage.block_calls]
        return step_seconds(timings, slots=max(layout.slots, 1))

    def _timing(self, call: BlockCall, streamed: dict[str, dict[str, int]]) -> BlockTiming:
        speed = self._speeds.disk if call.role in self._disk or self._workload.on_host else self._speeds.link
        size = streamed.get(call.role, {}).get(call.block, 0)
        return BlockTiming(call.flops / self._speeds.compute, size / speed)


def _shrinking(
    components: Sequence[ComponentFootprint], least: dict[str, frozenset[str]]
) -> Iterator[dict[str, frozenset[str]]]:
    """Yield dicts role (component name) -> frozenset of its resident blocks' names: first with all blocks, then with
    one fewer each time, down to `least`.
    """
    optional: list[tuple[str, BlockFootprint]] = [
        (component.role, block) for component in components if not least[component.role] for block in component.blocks
    ]
    for count in range(len(optional), -1, -1):
        kept = [optional[index] for index in spread(count, len(optional))]
        yield {
            role: always | frozenset(block.name for owner, block in kept if owner == role)
            for role, always in least.items()
        }


def _gib_rounded_up(size: int) -> float:
    return -(-size * 100 // GIB) / 100
