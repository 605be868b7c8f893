"""What fits into how much memory, and how long it takes: arithmetic over sizes. No tensors, no modules."""

from __future__ import annotations

from diffsynth.core.planning.overlap import BlockTiming, step_seconds
from diffsynth.core.planning.plan import ComponentPlan, MemoryPlan, StagePlan, StorageOption
from diffsynth.core.planning.planner import plan_memory
from diffsynth.core.planning.workload import BlockCall, BlockFootprint, ComponentFootprint, Speeds, StageCost, Workload

__all__ = [
    "BlockCall",
    "BlockFootprint",
    "BlockTiming",
    "ComponentFootprint",
    "ComponentPlan",
    "MemoryPlan",
    "Speeds",
    "StageCost",
    "StagePlan",
    "StorageOption",
    "Workload",
    "plan_memory",
    "step_seconds",
]
