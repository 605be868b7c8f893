"""What fits into how much memory, and how long it takes: arithmetic over sizes. No tensors, no modules."""

from __future__ import annotations

from diffsynth.core.vram.budget.overlap import Turn, step_seconds
from diffsynth.core.vram.budget.plan import MemoryPlan, Residence, StagePlan, StorageOption
from diffsynth.core.vram.budget.planner import plan_memory
from diffsynth.core.vram.budget.workload import BlockLoad, ComponentLoad, Run, Speeds, StageLoad, Workload

__all__ = [
    "BlockLoad",
    "ComponentLoad",
    "MemoryPlan",
    "Residence",
    "Run",
    "Speeds",
    "StageLoad",
    "StagePlan",
    "StorageOption",
    "Turn",
    "Workload",
    "plan_memory",
    "step_seconds",
]
