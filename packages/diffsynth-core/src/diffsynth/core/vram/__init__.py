"""Offloaded weights: policies, blocks that are streamed to a device, and the modules that a device holds.

    managed = wrap(model, Policy.preset("cpu-offload", "cuda"))

`diffsynth.core.planning` predicts what fits into how much memory, and decides which blocks stay.
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
