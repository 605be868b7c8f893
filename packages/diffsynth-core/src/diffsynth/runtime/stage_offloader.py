"""Which components are on the device while a stage runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from diffsynth.core.planning import MemoryPlan
from diffsynth.core.vram.loaded_modules import loaded_modules
from diffsynth.core.vram.managed import ManagedModule, managed
from diffsynth.core.vram.report import TransferReport
from diffsynth.runtime.plan_cache import follow, spare_room


class StageOffloader:
    """Brings the wrapped modules of a pipeline to its device for the stages that use them.

    Modules that are not wrapped are where they are, and processors never move.

    Args:
        components: role -> module or processor.
        device: where computation happens.
    """

    def __init__(self, components: Mapping[str, Any], device: torch.device) -> None:
        found = {role: managed(part) for role, part in components.items() if isinstance(part, torch.nn.Module)}
        self._managed: dict[str, ManagedModule] = {role: module for role, module in found.items() if module is not None}
        self._loaded = loaded_modules(device)

    @property
    def is_needed(self) -> bool:
        """Whether anything moves."""
        return bool(self._managed)

    @property
    def reports(self) -> dict[str, TransferReport]:
        """What the transfers of each wrapped component cost."""
        return {role: module.report for role, module in self._managed.items()}

    @contextmanager
    def on_device(self, roles: Collection[str], stage: str = "", plan: MemoryPlan | None = None) -> Iterator[None]:
        """Have these roles on the device inside the `with`; threads that share a device take turns.

        Args:
            roles: that the stage uses.
            stage: its name in the plan.
            plan: what stays, what streams and what may be there meanwhile; without one each role is there whole, and
                alone.
        """
        used = [self._managed[role] for role in roles if role in self._managed]
        if not used:
            yield
            return
        with self._loaded.turn():
            beside = [] if plan is None else follow(plan, stage, roles, self._managed)
            with self._loaded.stage(used, beside=beside):
                yield

    def prepare(self, roles: Collection[str]) -> None:
        """A hint: these roles are wanted soon, by another stage than the one that runs. See `ManagedModule.prepare`."""
        for role in roles:
            if role in self._managed:
                self._managed[role].prepare()

    def begin_step(self, roles: Collection[str], *, is_first: bool) -> None:
        """A step of a loop begins, with these roles.

        Args:
            roles: that it uses.
            is_first: no step before it was like it, so nothing is known of how often their blocks run.
        """
        for role in roles:
            if role in self._managed:
                self._managed[role].begin_round(forgets=is_first)

    @contextmanager
    def overlapped_swap(
        self, roles: Collection[str], following: Collection[str], stage: str, plan: MemoryPlan | None
    ) -> Iterator[None]:
        """Inside the `with` the last step that uses some roles runs, and those that the next one uses set out.

        Args:
            roles, following: of this step and of the next.
            stage: name of both in the plan.
            plan: what may be on the device; without one what comes takes the place of what goes.
        """
        coming = {role: self._managed[role] for role in following if role in self._managed and role not in roles}
        leaving = [
            self._managed[role]
            for role in roles
            if role in self._managed and role not in following and (plan is None or role in plan.evicted)
        ]
        room = 0
        if plan is not None:
            follow(plan, stage, following, coming)
            room = spare_room(plan, stage, roles, coming)
        with self._loaded.overlapped_swap(leaving, list(coming.values()), room=room):
            yield

    def rest(self, plan: MemoryPlan | None) -> None:
        """After a call: what the plan did not let stay leaves the device; without one everything does."""
        for role, module in self._managed.items():
            if plan is None or role in plan.evicted:
                module.leave()
