"""A `vram_limit` on the CPU, where pipelines keep none: tests set the plans of a device with so much memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from diffsynth.core.planning import MemoryPlan
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
