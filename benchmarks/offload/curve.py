"""Predicted seconds per step, without a device: by the share of resident blocks, and by a limit.

Link and device are one speed each. Weights, activations and operations are those of a meta trace of the network at its
published size; times are those of `diffsynth.core.planning`, which plans of users have, too.
"""

from __future__ import annotations

from typing import Any

import torch
from offload.networks import NETWORKS, Network

from diffsynth.core.planning import (
    BlockCall,
    BlockFootprint,
    BlockTiming,
    ComponentFootprint,
    Speeds,
    StageCost,
    StageKind,
    Workload,
    plan_memory,
    spread,
    step_seconds,
)
from diffsynth.core.planning.tracer import MetaTracer
from diffsynth.core.planning.workload import GIB
from diffsynth.core.vram.partition import partition

SHARES = (0.0, 0.25, 0.42, 0.75, 1.0)

MACHINES = {
    "H100, PCIe 5": Speeds(link=50e9, compute=590e12, disk=5e9, source="60 % of 989 TFLOP/s; 50 of 63 GB/s"),
    "RTX 4090, PCIe 4": Speeds(link=25e9, compute=100e12, disk=5e9, source="60 % of 165 TFLOP/s; 25 of 31.5 GB/s"),
    "L20, PCIe 4": Speeds(link=25e9, compute=90e12, disk=5e9, source="75 % of 119.5 TFLOP/s; 25 of 31.5 GB/s"),
}
"""Assumed, not measured: shares of data sheets."""

PUBLISHED = ((1, 49.0), (4, 41.0), (8, 33.0), (14, 26.0), (16, 24.6), (38, 23.4))
"""GiB of the whole process and seconds of a whole image: cache-dit's layerwise offload of FLUX.1-dev on an L20, with no
bucket, one, one and four resident blocks, more of these, and everything resident."""


def workload(network: Network, device_type: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Workload:
    """Return the sizes and costs of one step of a network, from a meta trace without weights."""
    meta = torch.device("meta")
    module = network.build(meta, dtype)
    parts = partition(module, smallest=network.smallest)
    blocks = {block.name: block.module for block in parts.blocks}
    tracer = MetaTracer(device_type, {"net": module}, {"net": blocks})
    with tracer, torch.no_grad(), tracer.stage("denoise") as stage:
        inputs = network.random_inputs(meta, dtype)
        module(**inputs)
    outside = BlockCall("net", "", max(stage.flops - sum(call.flops for call in stage.block_calls), 0))
    footprints = tuple(BlockFootprint(block.name, block.bytes(), block.bytes()) for block in parts.blocks)
    component = ComponentFootprint("net", footprints, parts.rest_bytes(), parts.rest_bytes())
    block_calls = (*stage.block_calls, outside)
    cost = StageCost(StageKind.DENOISE, "denoise", ("net",), stage.device_bytes, block_calls=block_calls, steps=8)
    return Workload((component,), (cost,))


def timings(load: Workload, resident: frozenset[str], speeds: Speeds) -> list[BlockTiming]:
    """Return the times of each block call of a step, and of the copy that it needs."""
    (component,), (stage,) = load.components, load.stages
    sizes = {block.name: block.stored for block in component.blocks if block.name not in resident}
    return [
        BlockTiming(call.flops / speeds.compute, sizes.get(call.block, 0) / speeds.link) for call in stage.block_calls
    ]


def by_share(load: Workload, speeds: Speeds) -> list[dict[str, Any]]:
    """Return a row for each share of resident blocks."""
    (component,), (stage,) = load.components, load.stages
    names = [block.name for block in component.blocks]
    everything = step_seconds(timings(load, frozenset(names), speeds), slots=1)
    rows = []
    for share in SHARES:
        resident = frozenset(names[index] for index in spread(round(share * len(names)), len(names)))
        streamed = len(names) - len(resident)
        seconds = step_seconds(timings(load, resident, speeds), slots=2)
        moved = sum(block.stored for block in component.blocks if block.name not in resident)
        rows.append(
            {
                "share": share,
                "vram": component.on_device(resident, slots=2 if streamed else 0) + stage.activations,
                "moved": moved,
                "seconds_per_step": seconds,
                "of_resident": seconds / everything,
                "hidden": 1 - (seconds - everything) / (moved / speeds.link) if moved else 1.0,
            }
        )
    return rows


def beside_published(load: Workload, speeds: Speeds) -> list[dict[str, Any]]:
    """Return the slowdown of the published curve and that of our plan, at the same memory.

    With everything resident, the published peak includes text encoders; below that they are offloaded. Ours are of the
    transformer alone.
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
    """Return the curves of all networks and machines."""
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
    """Return the lines of a table."""
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
