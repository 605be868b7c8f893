"""The schedule without a device: seconds per step by the share of blocks that stays, and by a limit.

A link and a device are one number each. Weights, activations and operations are those of a rehearsal of the network at
its published size, on meta; the schedule is `diffsynth.core.planning`, the arithmetic that users' plans are made of.
"""

from __future__ import annotations

from typing import Any

import torch
from offload.networks import NETWORKS, Network

from diffsynth.core.planning import (
    BlockCall,
    BlockTiming,
    ComponentFootprint,
    Speeds,
    StageCost,
    Workload,
    plan_memory,
    step_seconds,
)
from diffsynth.core.planning.planner import spread
from diffsynth.core.planning.tracer import MetaTracer
from diffsynth.core.planning.workload import BlockFootprint
from diffsynth.core.vram.partition import partition

GIB = 2**30
SHARES = (0.0, 0.25, 0.42, 0.75, 1.0)

MACHINES = {
    "H100, PCIe 5": Speeds(link=50e9, compute=590e12, disk=5e9, source="60 % of 989 TFLOP/s; 50 of 63 GB/s"),
    "RTX 4090, PCIe 4": Speeds(link=25e9, compute=100e12, disk=5e9, source="60 % of 165 TFLOP/s; 25 of 31.5 GB/s"),
    "L20, PCIe 4": Speeds(link=25e9, compute=90e12, disk=5e9, source="75 % of 119.5 TFLOP/s; 25 of 31.5 GB/s"),
}
"""Assumed, not measured: shares of data sheets."""

PUBLISHED = ((1, 49.0), (4, 41.0), (8, 33.0), (14, 26.0), (16, 24.6), (38, 23.4))
"""GiB of the whole process and seconds of a whole picture: cache-dit's layerwise offload of FLUX.1-dev on an L20, with
no bucket, one, one and four resident blocks, more of these, and everything resident."""


def workload(network: Network, device_type: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Workload:
    """One step of a network, rehearsed without weights."""
    meta = torch.device("meta")
    module = network.build(meta, dtype)
    parts = partition(module, smallest=network.smallest)
    blocks = {block.name: block.module for block in parts.blocks}
    tracer = MetaTracer(device_type, {"net": module}, {"net": blocks})
    with tracer, torch.no_grad(), tracer.stage("denoise") as stage:
        inputs = network.draw(meta, dtype)
        module(**inputs)
    runs = tuple(BlockCall("net", block_run.block, block_run.flops) for block_run in stage.blocks_run)
    outside = BlockCall("net", "", max(stage.flops - sum(run.flops for run in runs), 0))
    loads = tuple(BlockFootprint(block.name, block.bytes(), block.bytes()) for block in parts.blocks)
    component = ComponentFootprint("net", loads, parts.rest_bytes(), parts.rest_bytes())
    return Workload((component,), (StageCost("denoise", ("net",), stage.device_bytes, runs=(*runs, outside), steps=8),))


def turns(load: Workload, resident: frozenset[str], speeds: Speeds) -> list[BlockTiming]:
    """Each run of a step, with the copy that it needs."""
    (component,), (stage,) = load.components, load.stages
    sizes = {block.name: block.stored for block in component.blocks if block.name not in resident}
    return [BlockTiming(run.flops / speeds.compute, sizes.get(run.block, 0) / speeds.link) for run in stage.runs]


def by_share(load: Workload, speeds: Speeds) -> list[dict[str, Any]]:
    """A row for each share of blocks that stays."""
    (component,), (stage,) = load.components, load.stages
    names = [block.name for block in component.blocks]
    everything = step_seconds(turns(load, frozenset(names), speeds), slots=1)
    rows = []
    for share in SHARES:
        resident = frozenset(names[index] for index in spread(round(share * len(names)), len(names)))
        away = len(names) - len(resident)
        seconds = step_seconds(turns(load, resident, speeds), slots=2)
        moved = sum(block.stored for block in component.blocks if block.name not in resident)
        rows.append(
            {
                "share": share,
                "vram": component.on_device(resident, slots=2 if away else 0) + stage.activations,
                "moved": moved,
                "seconds_per_step": seconds,
                "of_resident": seconds / everything,
                "hidden": 1 - (seconds - everything) / (moved / speeds.link) if moved else 1.0,
            }
        )
    return rows


def beside_published(load: Workload, speeds: Speeds) -> list[dict[str, Any]]:
    """At the published curve's memory: its slowdown, and that of our plan for as much.

    The published peaks are of a process that holds text encoders, too, while everything is resident; below that they
    are off the device, as ours would be. So ours are of the transformer alone.
    """
    everything = plan_memory(load, speeds=speeds).seconds_per_step
    rows = []
    for gib, seconds in PUBLISHED:
        row: dict[str, Any] = {"gib": gib, "published": seconds / PUBLISHED[-1][1]}
        smallest = plan_memory(load, vram_limit=0, speeds=speeds).smallest_vram
        if gib * GIB >= smallest:
            plan = plan_memory(load, vram_limit=gib, speeds=speeds)
            row |= {"ours": plan.seconds_per_step / everything, "ours_gib": plan.peak_vram / GIB}
        else:
            row |= {"ours": None, "needs_gib": smallest / GIB}
        rows.append(row)
    return rows


def simulated(scale: str = "full", networks: tuple[str, ...] = ("flux", "wan", "z-image")) -> dict[str, Any]:
    """All curves."""
    report: dict[str, Any] = {"assumed": {name: vars(speeds) for name, speeds in MACHINES.items()}, "curves": {}}
    for name in networks:
        network = NETWORKS[name](scale, "diffusers" if name == "flux" else "diffsynth")
        load = workload(network)
        for machine, speeds in MACHINES.items():
            report["curves"][f"{network.name} | {machine}"] = by_share(load, speeds)
        if name == "flux":
            report["beside_published"] = beside_published(load, MACHINES["L20, PCIe 4"])
    return report


def show(report: dict[str, Any]) -> list[str]:
    """Lines of a table."""
    lines = [f"{'simulated':58} {'stays':>6} {'GiB':>6} {'GB moved':>9} {'s/step':>8} {'/resident':>9} {'hidden':>7}"]
    for name, rows in report["curves"].items():
        for row in rows:
            figures = f"{row['share']:>6.0%} {row['vram'] / GIB:>6.1f} {row['moved'] / 1e9:>9.2f}"
            lines.append(
                f"{name:58} {figures} {row['seconds_per_step']:>8.3f} {row['of_resident']:>9.2f} {row['hidden']:>7.0%}"
            )
    if "beside_published" in report:
        lines.append("FLUX.1 on an L20, of resident: published (cache-dit), and our plan with as much memory")
        for row in report["beside_published"]:
            ours = f"{row['ours']:.2f}" if row["ours"] is not None else f"needs {row['needs_gib']:.1f} GiB"
            lines.append(f"{row['gib']:>6} GiB {row['published']:>6.2f} {ours:>16}")
    return lines
