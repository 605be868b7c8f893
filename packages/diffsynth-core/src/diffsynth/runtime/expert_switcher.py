"""Experts of the loop take turns: each is on the device for its steps, and the next one comes as the last one goes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from diffsynth.core.planning import MemoryPlan
from diffsynth.runtime.stage_offloader import StageOffloader


class ExpertSwitcher:
    """The components of every step of a loop, from the first step on.

    Args:
        residency: of the pipeline.
        roles: that each step uses.
        plan: of the call, if there is one.
    """

    def __init__(self, offloader: StageOffloader, roles: Sequence[tuple[str, ...]], plan: MemoryPlan | None) -> None:
        self._offloader = offloader
        self._roles = list(roles)
        self._plan = plan
        self._step = -1
        self._stage = ExitStack()

    def begin_step(self) -> None:
        """Have the components of the next step on the device; in the last step of one expert, have another set out."""
        before = self._roles[self._step] if self._step >= 0 else None
        self._step += 1
        roles = self._roles[self._step]
        if roles != before:
            self._stage.close()
            self._stage.enter_context(self._offloader.on_device(roles, "denoise", self._plan))
        self._offloader.begin_step(roles, is_first=roles != before)
        following = self._roles[self._step + 1] if self._step + 1 < len(self._roles) else roles
        if following != roles:
            self._offloader.prepare([role for role in following if role not in roles])
            self._stage.enter_context(self._offloader.overlapped_swap(roles, following, "denoise", self._plan))

    def __enter__(self) -> ExpertSwitcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._stage.close()
