"""From a workload and its limits to a plan.

What costs least is given up first: components that do not run leave the device; then blocks of those that run stream,
as few as possible and spread over their depth; then the autoencoder works in tiles, which may change its pixels. The
dtype that weights wait in is the caller's to allow: of several workloads the first is taken, unless it does not fit or
another one's steps are predicted to be faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from diffsynth.core.planning.overlap import BlockTiming, step_seconds
from diffsynth.core.planning.plan import ComponentPlan, MemoryPlan, StagePlan, StorageOption
from diffsynth.core.planning.workload import BlockCall, BlockFootprint, ComponentFootprint, Speeds, StageCost, Workload
from diffsynth.errors import NotEnoughMemory

GIB = 2**30
_DEPTHS = (2, 3, 4)
"""Slots that are tried: one block computes, the others are on their way."""

_GAIN = 0.05
"""How much faster steps must be for weights to be rounded; converting them takes time that no prediction has."""

_STAGING = 2
"""Buffers between disk and device, each as large as the largest block."""


def plan_memory(
    *workloads: Workload,
    vram_limit: float | None = None,
    ram_limit: float | None = None,
    speeds: Speeds,
    offloads: bool = False,
    disk: Sequence[str] = (),
) -> MemoryPlan:
    """The plan of the first workload that fits, or of a later one whose steps are predicted to be faster by 5 %.

    Args:
        workloads: one call, with its weights stored in one dtype or another; the first is what is wanted if it costs
            nothing. `options` of the plan has what was predicted for each.
        vram_limit: GiB on the device: None is no limit, and nothing ever leaves it; 0 keeps no block there and takes
            as little as possible. On the host `ram_limit` is what counts.
        ram_limit: GiB of the whole process, or None.
        speeds: for times.
        offloads: components leave the device between stages even if nothing limits it.
        disk: roles whose weights wait on disk in any case; others do where `ram_limit` asks for it.

    Raises:
        NotEnoughMemory: none fits; the message has the smallest limit that would.
        ValueError: a limit below 0.
    """
    for name, limit in (("vram_limit", vram_limit), ("ram_limit", ram_limit)):
        if limit is not None and not limit >= 0:
            raise ValueError(f"{name}={limit!r}: expected GiB of at least 0, or None for no limit")
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
        if plan.seconds_per_step < (1 - _GAIN) * chosen.seconds_per_step:
            chosen = plan
    return replace(chosen, options=tuple(options) if len(options) > 1 else ())


def spread(count: int, of: int) -> frozenset[int]:
    """Indices of `count` things among `of`, as far apart as possible."""
    return frozenset(index for index in range(of) if (index + 1) * count // of > index * count // of)


@dataclass(frozen=True)
class _Choice:
    """Where the blocks of the components of one stage are."""

    resident: dict[str, frozenset[str]]
    slots: int


class _Planner:
    def __init__(
        self,
        workload: Workload,
        vram_limit: float | None,
        ram_limit: float | None,
        speeds: Speeds,
        offloads: bool,
        disk: frozenset[str],
    ) -> None:
        self._load = workload
        self._vram, self._ram = vram_limit, ram_limit
        self._speeds = speeds
        self._offloads = offloads or vram_limit is not None
        self._loop_roles = {role for stage in workload.stages if stage.steps > 1 for role in stage.roles}
        self._disk = disk

    def plan(self) -> MemoryPlan:
        whole, in_tiles = (self._least_of_all(load) for load in (self._load, self._load.cut()))
        smallest_vram = min(whole, in_tiles)
        limit = self._device_limit()
        if limit is not None and limit < whole and in_tiles < whole:
            self._load = self._load.cut()
        if limit and limit < smallest_vram:
            raise NotEnoughMemory(self._too_small(limit, smallest_vram))
        stays = self._staying(limit)
        choices = [self._choose(stage, stays, limit) for stage in self._load.stages]
        self._disk |= self._onto_disk(choices, stays)
        return MemoryPlan(
            stages=self._sent_ahead(
                [self._stage(*pair, stays) for pair in zip(self._load.stages, choices, strict=True)], limit
            ),
            vram_limit=self._vram,
            ram_limit=self._ram,
            smallest_vram=0 if self._load.on_host else smallest_vram,
            smallest_ram=self._least_ram(),
            storage=self._load.storage,
            evicted=tuple(part.role for part in self._load.components if part.role not in stays),
            speeds=self._speeds,
            asks_for_tiles=self._load.asks_for_tiles,
        )

    def _device_limit(self) -> int | None:
        """Bytes for weights and activations; None for no limit, 0 for as little as possible."""
        if not self._load.on_host:
            return None if self._vram is None else int(self._vram * GIB)
        if self._ram is None:
            return None
        return max(int(self._ram * GIB) - self._load.base - max(stage.host for stage in self._load.stages), 1)

    def _too_small(self, limit: int, smallest: int) -> str:
        stage = max(self._load.stages, key=self._least)
        name, asked = ("ram_limit", self._ram) if self._load.on_host else ("vram_limit", self._vram)
        smallest += 0 if not self._load.on_host else int((self._ram or 0) * GIB) - limit
        stored = f" stored in {self._load.storage}" if self._load.storage else ""
        return (
            f"{name}={asked} GiB is too small for {stage.name}{stored}: its activations alone take "
            f"{stage.activations / GIB:.2f} GiB. The smallest limit that can be kept is "
            f"{_round_up(smallest):.2f} GiB; a smaller picture takes less"
        )

    def _least_of_all(self, load: Workload) -> int:
        return max((self._least(stage) for stage in load.stages), default=0)

    def _least(self, stage: StageCost) -> int:
        """Bytes with nothing resident and one slot."""
        parts = [self._load.component(role) for role in stage.roles]
        return stage.activations + sum(part.on_device(frozenset(), slots=1) for part in parts)

    def _least_ram(self) -> int:
        if self._load.on_host:
            least = max((self._least(stage) + stage.host for stage in self._load.stages), default=0)
            return self._load.base + least
        blocks = [block.stored for part in self._load.components for block in part.blocks]
        return self._load.base + max(stage.host for stage in self._load.stages) + _STAGING * max(blocks, default=0)

    def _staying(self, limit: int | None) -> frozenset[str]:
        """Components that never leave the device: all that fit beside what every stage needs at least.

        Those of the loop are the last to go: they are the largest, and would have to come back for each call.
        """
        every = [part.role for part in self._load.components]
        if limit is None:
            return frozenset() if self._offloads else frozenset(every)
        by_cost = sorted(self._load.components, key=lambda part: (part.role in self._loop_roles, -part.whole))
        for leaving in range(len(every) + 1):
            stays = frozenset(part.role for part in by_cost[leaving:])
            if all(self._room(stage, stays, limit) >= self._least_beside(stage, stays) for stage in self._load.stages):
                return stays
        return frozenset()

    def _least_beside(self, stage: StageCost, stays: frozenset[str]) -> int:
        parts = [self._load.component(role) for role in stage.roles if role not in stays]
        if stage.steps > 1 and (self._loop_roles & stays) - set(stage.roles):
            # One expert does not stay at the price of streaming another in each of its steps.
            return sum(part.whole for part in parts)
        return sum(part.on_device(frozenset(), slots=2) for part in parts) if stays else 0

    def _room(self, stage: StageCost, stays: frozenset[str], limit: int) -> int:
        return limit - stage.activations - sum(self._load.component(role).whole for role in stays)

    def _choose(self, stage: StageCost, stays: frozenset[str], limit: int | None) -> _Choice:
        parts = [self._load.component(role) for role in stage.roles]
        whole = {part.role: frozenset(block.name for block in part.blocks) for part in parts}
        if limit is None:
            return _Choice(whole, 0)
        nothing = {role: whole[role] if role in stays else frozenset[str]() for role in stage.roles}
        if limit == 0:
            return _Choice({role: frozenset() for role in stage.roles}, 1)
        beside = sum(self._load.component(role).whole for role in stays if role not in stage.roles)
        fits = self._fitting(parts, whole, nothing, limit - beside - stage.activations)
        assert fits, f"{stage.name}: nothing fits, though the limit is not below the least"
        return _Choice(*min(fits, key=lambda pair: (self._seconds(stage, *pair), pair[1])))

    def _fitting(
        self,
        parts: Sequence[ComponentFootprint],
        whole: dict[str, frozenset[str]],
        nothing: dict[str, frozenset[str]],
        room: int,
    ) -> list[tuple[dict[str, frozenset[str]], int]]:
        """Resident blocks by role, as many as there is room for, for each depth that fits; one slot if no other."""
        if sum(part.whole for part in parts) <= room:
            return [(whole, 0)]
        found = []
        for slots in (*_DEPTHS, 1):
            if slots == 1 and found:
                break
            for resident in _ever_fewer(parts, whole, nothing):
                if sum(part.on_device(resident[part.role], slots=slots) for part in parts) <= room:
                    found.append((resident, slots))
                    break
        return found

    def _onto_disk(self, choices: Sequence[_Choice], stays: frozenset[str]) -> frozenset[str]:
        """Components whose weights cannot wait in host memory: those that move least first.

        Raises:
            NotEnoughMemory: even with all of them on disk the limit is too small.
        """
        if self._ram is None or self._load.on_host:
            return frozenset()
        limit = int(self._ram * GIB)
        if limit < self._least_ram():
            raise NotEnoughMemory(
                f"ram_limit={self._ram} GiB is too small: the process and its buffers take "
                f"{_round_up(self._least_ram()):.2f} GiB even if all weights wait on disk"
            )
        traffic = dict.fromkeys((part.role for part in self._load.components), 0)
        for stage, choice in zip(self._load.stages, choices, strict=True):
            for role in stage.roles:
                traffic[role] += self._moved_once(role, choice, stays) + stage.steps * self._moved(stage, choice, role)
        moved: set[str] = set()
        for role in sorted(traffic, key=lambda role: traffic[role]):
            if max(self._host(stage, stays, self._disk | moved) for stage in self._load.stages) <= limit:
                break
            moved.add(role)
        return frozenset(moved)

    def _stage(self, stage: StageCost, choice: _Choice, stays: frozenset[str]) -> StagePlan:
        parts = {role: self._load.component(role) for role in stage.roles}
        components = tuple(
            ComponentPlan(
                role,
                tuple(block.name for block in part.blocks if block.name in choice.resident[role]),
                streamed := tuple(block.name for block in part.blocks if block.name not in choice.resident[role]),
                choice.slots if streamed else 0,
                self._waits(role, stays),
                role in stays,
            )
            for role, part in parts.items()
        )
        weights = sum(part.on_device(choice.resident[role], slots=choice.slots) for role, part in parts.items())
        beside = sum(self._load.component(role).whole for role in stays if role not in parts)
        on_device = stage.activations + weights + beside
        ram = self._host(stage, stays, self._disk) + (on_device if self._load.on_host else 0)
        return StagePlan(
            name=stage.name,
            components=components,
            activations=stage.activations,
            vram=0 if self._load.on_host else on_device,
            ram=ram,
            bytes_once=sum(self._moved_once(role, choice, stays) for role in parts),
            bytes_per_step=sum(self._moved(stage, choice, role) for role in parts),
            steps=stage.steps,
            seconds_per_step=self._seconds(stage, choice.resident, choice.slots),
            tiled=stage.in_tiles,
        )

    def _sent_ahead(self, stages: list[StagePlan], limit: int | None) -> tuple[StagePlan, ...]:
        """Where experts take turns, blocks of the next take the place of those that have run for the last time.

        That is learnt from the step before, so where there is none only free memory counts. See `OverlappedSwap`.
        """
        for index, (earlier, later) in enumerate(pairwise(stages), start=1):
            coming = [each for each in later.components if each.role not in earlier.roles and each.waits == "host"]
            if not (earlier.name.startswith("denoise") and later.name.startswith("denoise")):
                continue
            leaving = [each for each in earlier.components if each.role not in later.roles and not each.stays]
            room = max(limit - earlier.vram, 0) if limit else 0
            room += sum(self._sizes(leaving)) if earlier.steps > 1 else 0
            ahead = [
                sent for sent in accumulate(self._sizes(each for each in coming if not each.stays)) if sent <= room
            ]
            stages[index] = replace(later, bytes_ahead=max(ahead, default=0))
        return tuple(stages)

    def _sizes(self, components: Iterable[ComponentPlan]) -> Iterator[int]:
        """Of resident blocks, as they move."""
        for component in components:
            kept = frozenset(component.resident)
            yield from (block.stored for block in self._load.component(component.role).blocks if block.name in kept)

    def _waits(self, role: str, stays: frozenset[str]) -> str:
        if role in self._disk or (self._load.on_host and role not in stays):
            return "disk"
        return "host" if self._offloads and not self._load.on_host else "device"

    def _host(self, stage: StageCost, stays: frozenset[str], disk: frozenset[str] | set[str]) -> int:
        """Host memory of a stage. Without a limit weights are on the device and nowhere else."""
        if self._load.on_host:
            return self._load.base + stage.host
        waiting = [part for part in self._load.components if self._offloads and part.role not in disk]
        reads = [block.stored for part in self._load.components if part.role in disk for block in part.blocks]
        return self._load.base + stage.host + sum(part.stored for part in waiting) + _STAGING * max(reads, default=0)

    def _moved_once(self, role: str, choice: _Choice, stays: frozenset[str]) -> int:
        if role in stays:
            return 0
        part = self._load.component(role)
        kept = choice.resident[role]
        return part.rest_stored + sum(block.stored for block in part.blocks if block.name in kept)

    def _moved(self, stage: StageCost, choice: _Choice, role: str) -> int:
        """Bytes in one step."""
        sizes = self._travelling(role, choice.resident[role], choice.slots)
        return sum(sizes.get(run.block, 0) for run in stage.runs if run.role == role)

    def _travelling(self, role: str, resident: frozenset[str], slots: int) -> dict[str, int]:
        """Streamed blocks and their bytes; none where all of them have a slot of their own."""
        streamed = [block for block in self._load.component(role).blocks if block.name not in resident]
        return {block.name: block.stored for block in streamed} if len(streamed) > slots else {}

    def _seconds(self, stage: StageCost, resident: dict[str, frozenset[str]], slots: int) -> float:
        travelling = {role: self._travelling(role, resident[role], slots) for role in stage.roles}
        return step_seconds([self._turn(run, travelling) for run in stage.runs], slots=max(slots, 1))

    def _turn(self, run: BlockCall, travelling: dict[str, dict[str, int]]) -> BlockTiming:
        speed = self._speeds.disk if run.role in self._disk or self._load.on_host else self._speeds.link
        size = travelling.get(run.role, {}).get(run.block, 0)
        return BlockTiming(run.flops / self._speeds.compute, size / speed)


def _ever_fewer(
    parts: Sequence[ComponentFootprint], whole: dict[str, frozenset[str]], nothing: dict[str, frozenset[str]]
) -> Iterator[dict[str, frozenset[str]]]:
    """Sets of resident blocks, the largest first; those of components that stay are always in."""
    loose: list[tuple[str, BlockFootprint]] = [
        (part.role, block) for part in parts if not nothing[part.role] for block in part.blocks
    ]
    for count in range(len(loose), -1, -1):
        kept = [loose[index] for index in spread(count, len(loose))]
        yield {role: nothing[role] | frozenset(block.name for owner, block in kept if owner == role) for role in whole}


def _round_up(size: int) -> float:
    """GiB to two places, not below the size."""
    return -(-size * 100 // GIB) / 100
