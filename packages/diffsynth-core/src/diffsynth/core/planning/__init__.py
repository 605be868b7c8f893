"""Memory plans: which weights fit into how much memory, and how long a step takes.

`plan_memory` turns a `Workload` and limits into a `MemoryPlan`: arithmetic over sizes, without torch. `tracer` measures
a workload by running code on torch's meta device.
"""

from __future__ import annotations

from diffsynth.core.planning.plan import ComponentPlan, MemoryPlan, StagePlan, StorageOption
from diffsynth.core.planning.planner import BlockTiming, plan_memory, spread, step_seconds
from diffsynth.core.planning.workload import (
    BlockCall,
    BlockFootprint,
    ComponentFootprint,
    Speeds,
    StageCost,
    StageKind,
    StageTrace,
    Workload,
)

__all__ = [
    "BlockCall",
    "BlockFootprint",
    "BlockTiming",
    "ComponentFootprint",
    "ComponentPlan",
    "MemoryPlan",
    "Speeds",
    "StageCost",
    "StageKind",
    "StagePlan",
    "StageTrace",
    "StorageOption",
    "Workload",
    "plan_memory",
    "spread",
    "step_seconds",
]
