"""A limit that is kept: a plan for each kind of call, made before it runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth.core.planning import MemoryPlan, StagePlan
from diffsynth.core.vram.managed import ManagedModule
from diffsynth.runtime.planning import plan_call
from diffsynth.runtime.request import Request

if TYPE_CHECKING:
    from diffsynth.runtime.pipeline import Pipeline

logger = logging.getLogger(__name__)

_OF_NO_ACCOUNT = frozenset({"seed", "on_step", "cancel", "progress_bar_cmd"})
"""Arguments that no size depends on."""


class PlanCache:
    """The plans of a pipeline's calls, one for each kind: equal sizes, counts and switches.

    Args:
        pipe: whose components are wrapped.
        vram_limit: GiB on the device.
        device: that the limit is of.
    """

    def __init__(self, pipe: Pipeline, vram_limit: float, device: torch.device) -> None:
        self._pipe = pipe
        self._device = device
        self._limit = vram_limit
        self._plans: dict[Any, MemoryPlan] = {}
        self._guard = threading.Lock()

    def plan(self, request: Request, arguments: Mapping[str, Any]) -> MemoryPlan:
        """The plan of a call.

        Args:
            request: the call, checked.
            arguments: as they were given.

        Raises:
            NotEnoughMemory: the limit cannot be kept; the message has the smallest that can.
            Unplannable: the pipeline's code asks for values that only a real run has.
        """
        texts = self._pipe.per_image
        kept = {name: value for name, value in arguments.items() if name not in _OF_NO_ACCOUNT and name not in texts}
        kept["num_images"] = request.batch_size
        kind = frozenset((name, _kind(value)) for name, value in kept.items())
        with self._guard:
            if kind not in self._plans:
                self._plans[kind] = plan_call(self._pipe, kept, device=self._device, vram_limit=self._limit)
                self._tell(self._plans[kind])
            return self._plans[kind]

    def forget(self) -> None:
        """The components take other memory now: plan anew."""
        with self._guard:
            self._plans.clear()

    def _tell(self, plan: MemoryPlan) -> None:
        logger.info(
            "vram_limit=%s GiB: at most %.2f GiB, %.2f GB moved a step%s%s",
            self._limit,
            plan.peak_vram / 2**30,
            plan.bytes_per_step / 1e9,
            f"; {', '.join(plan.evicted)} leave between stages" if plan.evicted else "",
            "; the autoencoder works in tiles" if plan.tiled else "",
        )


def follow(
    plan: MemoryPlan, stage: str, roles: Collection[str], modules: Mapping[str, ManagedModule]
) -> list[ManagedModule]:
    """Set the components of a stage up as planned; gives those that may stay on the device beside them.

    Args:
        plan: of the call.
        stage: its name. One that the plan has no line for, as it costs next to nothing, has its components as another
            stage has them.
        roles: that it uses: where experts take turns, each has a stage of the loop.
        modules: wrapped components by role.
    """
    for component in (each for line in _lines(plan, stage, roles) or plan.stages for each in line.components):
        if component.role in roles and component.role in modules:
            modules[component.role].configure(resident=component.resident, slots=max(component.slots, 1))
    return [module for role, module in modules.items() if role not in plan.evicted]


def spare_room(plan: MemoryPlan, stage: str, roles: Collection[str], coming: Mapping[str, ManagedModule]) -> int:
    """Bytes on the device that components of the next stage may take before this one ends.

    Args:
        plan: of the call.
        stage, roles: the stage that runs, as for `follow`.
        coming: wrapped components of the next, by role.
    """
    kept = sum(module.footprint(role).whole for role, module in coming.items() if role not in plan.evicted)
    lines = _lines(plan, stage, roles)
    if plan.vram_limit is None or not lines:
        return kept
    return kept + max(int(plan.vram_limit * 2**30) - max(line.vram for line in lines), 0)


def _lines(plan: MemoryPlan, stage: str, roles: Collection[str]) -> list[StagePlan]:
    """The plan's lines for a stage: those of these roles alone, if there are any; some of them may not be loaded."""
    lines = [line for line in plan.stages if line.name == stage] if stage != "denoise" else list(plan.loop)
    return [line for line in lines if set(line.roles) <= set(roles)] or lines


def _kind(value: Any) -> Any:
    """What of an argument's value sizes may depend on."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Image.Image):
        return ("image", value.size)
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_kind, value))
    return type(value).__qualname__
