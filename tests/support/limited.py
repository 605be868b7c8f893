"""A `vram_limit` on the CPU, where pipelines keep none: tests set the plans of a device with so much memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from diffsynth.core.planning import MemoryPlan
from diffsynth.core.vram.managed import ManagedModule
from diffsynth.runtime import architectures
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.plan_cache import PlanCache
from diffsynth.runtime.planning import plan_call


def keep_limit(pipe: Pipeline, gib: float) -> list[MemoryPlan]:
    """Have a pipeline on the CPU keep a limit as if it were on a CUDA device; returns its plans as they are made."""
    plans: list[MemoryPlan] = []

    def make_plan(arguments: Mapping[str, Any]) -> MemoryPlan:
        plans.append(plan_call(pipe, arguments, device="cuda", vram_limit=gib))
        return plans[-1]

    pipe.plan_cache = PlanCache(make_plan, gib, pipe.per_image)
    return plans


def let_blocks_travel(monkeypatch: pytest.MonkeyPatch, *, smallest: int = 0) -> None:
    """Have every block of at least `smallest` bytes streamed: those of tiny networks are below the usual size."""
    cuts = architectures.cuts
    monkeypatch.setattr(architectures, "cuts", lambda architecture: cuts(architecture) | {"smallest": smallest})


@contextmanager
def device_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[ManagedModule, int]]:
    """Yield a dict that is filled while pipelines run: component -> most bytes of its weights on the device at once."""
    entered: set[ManagedModule] = set()
    most: dict[ManagedModule, int] = {}
    enter = ManagedModule.enter

    def watched(self: ManagedModule) -> None:
        entered.add(self)
        enter(self)

    def measure(*_: Any) -> None:
        for component in entered:
            most[component] = max(most.get(component, 0), component.device_bytes)

    monkeypatch.setattr(ManagedModule, "enter", watched)
    hooks = register_module_forward_pre_hook(measure), register_module_forward_hook(measure)
    yield most
    for hook in hooks:
        hook.remove()
