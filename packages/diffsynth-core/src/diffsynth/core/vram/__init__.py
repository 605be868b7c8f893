"""Weights that come and go: policies, blocks that stream, budgets and plans.

    managed = wrap(model, Policy.preset("cpu-offload", "cuda"))

`budget` and `rehearsal` are packages of their own: what fits into how much memory, and what a call would take.
"""

from __future__ import annotations

from diffsynth.core.vram.disk_map import DiskMap
from diffsynth.core.vram.loaded_modules import LoadedModules, loaded_modules
from diffsynth.core.vram.managed import ManagedModule, managed, wrap
from diffsynth.core.vram.partition import Block, Partition, partition
from diffsynth.core.vram.policy import Auto, BlockState, Placement, Policy
from diffsynth.core.vram.report import TransferReport

__all__ = [
    "Auto",
    "Block",
    "BlockState",
    "DiskMap",
    "LoadedModules",
    "ManagedModule",
    "Partition",
    "Placement",
    "Policy",
    "TransferReport",
    "loaded_modules",
    "managed",
    "partition",
    "wrap",
]
