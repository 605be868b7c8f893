"""Loading the components of a pipeline on the device for the stages that use them, and offloading them again.

`StageOffloader` serves one stage after the other, `ExpertSwitcher` the steps of the loop, whose experts change. Modules
that no policy wraps stay where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from diffsynth.core.planning import MemoryPlan, StagePlan
from diffsynth.core.planning.workload import GIB
from diffsynth.core.vram.loaded_modules import loaded_modules
from diffsynth.core.vram.managed import ManagedModule, managed
from diffsynth.core.vram.policy import BlockState
from diffsynth.core.vram.report import TransferReport


class StageOffloader:
    """Loads the wrapped modules of a pipeline on its device for the stages that use them.

    Args:
        components: role -> module, processor or None; only wrapped modules are moved.
        device: the device that computes.
    """

    def __init__(self, components: Mapping[str, Any], device: torch.device) -> None:
        found = {role: managed(part) for role, part in components.items() if isinstance(part, torch.nn.Module)}
        self._managed: dict[str, ManagedModule] = {role: module for role, module in found.items() if module is not None}
        self._loaded = loaded_modules(device)

    @property
    def is_needed(self) -> bool:
        """Whether any component of the pipeline is wrapped, so that its weights are moved."""
        return bool(self._managed)

    @property
    def reports(self) -> dict[str, TransferReport]:
        """A dict role -> `TransferReport` of the weight transfers so far, for each wrapped component."""
        return {role: module.report for role, module in self._managed.items()}

    @contextmanager
    def on_device(
        self, roles: Collection[str], stage: str = "", plan: MemoryPlan | None = None, *, in_loop: bool = False
    ) -> Iterator[None]:
        """Context manager that loads these roles' wrapped components on the device while other threads' stages wait;
        without a wrapped one it does nothing.

        Args:
            roles: the roles that the stage uses.
            stage: its name in the plan; of no effect with `in_loop`.
            plan: the blocks that stay resident and the components that may be loaded beside these roles; None loads
                each role whole and offloads all others.
            in_loop: whether it is the loop, whose steps may have a stage in the plan for each set of roles.
        """
        used = [self._managed[role] for role in roles if role in self._managed]
        if not used:
            yield
            return
        with self._loaded.lock():
            lines = [] if plan is None else _lines(plan, stage, roles, in_loop=in_loop)
            beside = [] if plan is None else _configure(plan, lines, roles, self._managed)
            with self._loaded.stage(used, keep=beside):
                yield

    @contextmanager
    def briefly_on_device(self, roles: Collection[str]) -> Iterator[None]:
        """Context manager that loads these roles' wrapped components block by block, and offloads them afterwards. In a
        stage of this thread its components are offloaded meanwhile, and loaded again when they run.

        Args:
            roles: the roles that are used.
        """
        used = [self._managed[role] for role in roles if role in self._managed]
        if not used:
            yield
            return
        with self._loaded.lock():
            # Those that the stage around uses may be in the middle of a block.
            own = [module for module in used if module.state is BlockState.OFFLOAD]
            settings = [(module.resident, module.slots) for module in own]
            for module in own:
                module.configure(resident=(), slots=1)
            try:
                with self._loaded.stage(used):
                    yield
            finally:
                for module, (resident, slots) in zip(own, settings, strict=True):
                    module.leave()
                    module.configure(resident=resident, slots=slots)

    def prepare(self, roles: Collection[str]) -> None:
        """Announce that a later stage uses these roles' wrapped components, so that their files are read ahead."""
        for role in roles:
            if role in self._managed:
                self._managed[role].prepare()

    def begin_step(self, roles: Collection[str], *, is_first: bool) -> None:
        """Notify the wrapped components of these roles that a step of the loop begins.

        Args:
            roles: the roles that the step uses.
            is_first: whether no earlier step used the same roles, so that the number of runs of each block is unknown.
        """
        for role in roles:
            if role in self._managed:
                self._managed[role].begin_step(is_first=is_first)

    @contextmanager
    def overlapped_swap(
        self, roles: Collection[str], following: Collection[str], plan: MemoryPlan | None
    ) -> Iterator[None]:
        """Context manager for the last step of these roles: the roles of the next step are loaded while it runs.

        Args:
            roles: the roles of this step.
            following: the roles of the next step.
            plan: the room on the device; without one, blocks are loaded only in the memory of offloaded blocks.
        """
        coming = {role: self._managed[role] for role in following if role in self._managed and role not in roles}
        leaving = [
            self._managed[role]
            for role in roles
            if role in self._managed and role not in following and (plan is None or role in plan.evicted)
        ]
        room = 0
        if plan is not None:
            _configure(plan, _lines(plan, "", following, in_loop=True), following, coming)
            room = _spare_room(plan, _lines(plan, "", roles, in_loop=True), coming)
        with self._loaded.overlapped_swap(leaving, list(coming.values()), free_bytes=room):
            yield

    def end_call(self, plan: MemoryPlan | None) -> None:
        """Offload the components that the plan evicts between stages, without a plan all wrapped ones; those that a
        stage of another thread may use, after that stage.
        """
        self._loaded.release([module for role, module in self._managed.items() if plan is None or role in plan.evicted])


class ExpertSwitcher:
    """Loads the components of each step of the loop. The next expert is loaded while the last step of this one runs.

    Args:
        offloader: of the pipeline.
        roles: the roles of each step, in order.
        plan: of the call, if there is one.
    """

    def __init__(self, offloader: StageOffloader, roles: Sequence[tuple[str, ...]], plan: MemoryPlan | None) -> None:
        self._offloader = offloader
        self._roles = list(roles)
        self._plan = plan
        self._step = -1
        self._stage = ExitStack()

    def begin_step(self) -> None:
        """Load the components of the next step; in the last step of an expert, begin to load the following one."""
        before = self._roles[self._step] if self._step >= 0 else None
        self._step += 1
        roles = self._roles[self._step]
        if roles != before:
            self._stage.close()
            self._stage.enter_context(self._offloader.on_device(roles, "", self._plan, in_loop=True))
        self._offloader.begin_step(roles, is_first=roles != before)
        following = self._roles[self._step + 1] if self._step + 1 < len(self._roles) else roles
        if following != roles:
            self._offloader.prepare([role for role in following if role not in roles])
            self._stage.enter_context(self._offloader.overlapped_swap(roles, following, self._plan))

    def __enter__(self) -> ExpertSwitcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._stage.close()


def _configure(
    plan: MemoryPlan, lines: Collection[StagePlan], roles: Collection[str], modules: Mapping[str, ManagedModule]
) -> list[ManagedModule]:
    """Set resident blocks and slots (load buffers) of a stage as planned; return a list of those `modules` that the
    plan does not evict.

    A stage without a line in the plan costs next to nothing; its components keep the settings of another stage.
    """
    for component in (each for line in lines or plan.stages for each in line.components):
        if component.role in roles and component.role in modules:
            modules[component.role].configure(resident=component.resident, slots=max(component.slots, 1))
    return [module for role, module in modules.items() if role not in plan.evicted]


def _spare_room(plan: MemoryPlan, lines: Collection[StagePlan], coming: Mapping[str, ManagedModule]) -> int:
    """Return the bytes on the device that the next step's components may take while a stage runs: the weights of those
    that are never evicted, plus what the stage leaves of `vram_limit`, if there is one.
    """
    staying = sum(module.footprint(role).whole for role, module in coming.items() if role not in plan.evicted)
    if plan.vram_limit is None or not lines:
        return staying
    return staying + max(int(plan.vram_limit * GIB) - max(line.vram for line in lines), 0)


def _lines(plan: MemoryPlan, stage: str, roles: Collection[str], *, in_loop: bool) -> list[StagePlan]:
    """Return a list of a stage's `StagePlan`s; only those of the expert with these roles if each expert has its own."""
    lines = list(plan.loop) if in_loop else [line for line in plan.stages if line.name == stage]
    # A role of a line may be empty or not loaded, so a line needs only some of `roles`.
    return [line for line in lines if set(line.roles) <= set(roles)] or lines
