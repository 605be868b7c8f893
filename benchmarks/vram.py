"""The cost of few weights on the device: our policies, no memory management, and the group offload of diffusers.

    python benchmarks/vram.py                                   on a GPU: FLUX, Wan, Z-Image at their published sizes
    python benchmarks/vram.py --networks flux                   one of them
    python benchmarks/vram.py --device cpu --scale small        casting and disk, measured on the CPU
    python benchmarks/vram.py --simulate                        no device: predicted seconds per step

All contenders run the same module with the same random weights and inputs, each in a process of its own. Our outputs
must equal those of the unmanaged module bit for bit, or the exit code is 1. A step is one forward pass. Times are
medians.

* cpu s: CPU time of all threads of the host in a step; on a busy machine it varies less than the clock.
* memory: the peak of torch's allocator on a GPU; on the CPU the peak of the process (VmHWM) above its memory before.
* moved, GB/s: for ours from the transfer report; diffusers moves every weight in every step.
* hidden: the share of the copying time that adds nothing to a step, 1 - (step - resident step) / copying; for ours
  from the speed of its copies, for diffusers from the speed of ours with 0 % resident.
* simulated: seconds of a step by `step_seconds`, from the resident step and the speed of the copies.
* plan: error of the memory that a plan predicts.
* ours/theirs: the time of our fastest row that takes no more memory than this row of diffusers, over its time.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import reporting
import torch
from offload import contenders, curve
from offload.networks import NETWORKS, SCALES

from diffsynth.core import device as devices
from diffsynth.core.planning import BlockTiming, step_seconds
from diffsynth.core.planning.workload import GIB

EXACT = ("diffsynth cpu-offload", "diffsynth disk")
"""Contenders whose output must equal that of the unmanaged module bit for bit."""

COLUMNS = (
    ("stays", "stays", ".0%", 1),
    ("s/step", "seconds", ".4f", 1),
    ("/resident", "of_resident", ".2f", 1),
    ("cpu s", "cpu_seconds", ".4f", 1),
    ("simulated", "simulated", ".4f", 1),
    ("RAM GiB", "peak_ram", ".2f", GIB),
    ("memory GiB", "memory", ".3f", GIB),
    ("plan", "memory_error", "+.1%", 1),
    ("GB moved", "moved", ".3f", 1e9),
    ("GB/s", "bytes_per_second", ".2f", 1e9),
    ("hidden", "hidden", ".0%", 1),
    ("ours/theirs", "ours_at_no_more_memory", ".2f", 1),
)
"""Title, key of a row, format, unit."""


def run_one(name: str, contender: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one contender in this process, and return its rows."""
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    network = NETWORKS[name](options.scale, "diffusers" if name == "flux" else options.library)
    load = contenders.traced(network, device, dtype)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        setting = contenders.Setting(
            network, device, dtype, options.repeats, options.warmup, Path(folder), not options.warm_cache, load
        )
        before, free = devices.memory_in_use("cpu") or 0, devices.available_memory("cpu") or 0
        rows = []
        for row in contenders.CONTENDERS[contender](setting):
            row["memory"] = row["peak_vram"] if device.type != "cpu" else (row["peak_ram"] or 0) - before
            # The system may not count pinned memory as memory of the process.
            row["host_taken"] = free - (devices.available_memory("cpu") or 0)
            rows.append({"contender": contender, "network": network.name, **row})
        return rows


def in_a_process(name: str, contender: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one contender in a process of its own; the row of one that fails has the exit code."""
    given = ["--one", contender, "--networks", name, "--device", options.device]
    for setting in ("scale", "library", "repeats", "warmup"):
        given += [f"--{setting}", str(getattr(options, setting))]
    given += ["--warm-cache"] if options.warm_cache else []
    given += ["--folder", str(options.folder)] if options.folder else []
    rows, failure = reporting.run_alone(__file__, *given)
    return rows if failure is None else [{"contender": contender, "network": name, "failed": failure}]


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add figures relative to the resident row, and to rows of diffusers, to the rows of one network."""
    done = [row for row in rows if "failed" not in row]
    base = next((row for row in done if row["contender"] == "resident"), None)
    link = next((row["bytes_per_second"] for row in done if row.get("bytes_per_second")), None)
    for row in done:
        flow = row.pop("flow", None)
        if base is None:
            continue
        row["of_resident"] = row["seconds"] / base["seconds"]
        row["memory_of_resident"] = row["memory"] / base["memory"] if base["memory"] else None
        row["same_bits"] = row["digest"] == base["digest"]
        speed = row.get("bytes_per_second") or link
        if row["moved"] and speed:
            row["hidden"] = min(max(1 - (row["seconds"] - base["seconds"]) * speed / row["moved"], 0.0), 1.0)
            if flow is not None:
                of_flop = base["seconds"] / sum(flops for flops, _ in flow)
                timings = [BlockTiming(flops * of_flop, size / speed) for flops, size in flow]
                row["simulated"] = step_seconds(timings, slots=row["slots"])
        if row.get("predicted") and row["memory"]:
            row["memory_error"] = row["predicted"] / row["memory"] - 1
    for row in done:
        if row["contender"] in ("diffusers block_level", "diffusers leaf_level"):
            mine = [each for each in done if each["contender"] in EXACT and each["memory"] <= row["memory"]]
            best = min(mine, key=lambda each: each["seconds"], default=None)
            row["ours_at_no_more_memory"] = None if best is None else best["seconds"] / row["seconds"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["network"] for row in rows):
        print(f"\n{name:46}" + " ".join(f"{title:>11}" for title, *_ in COLUMNS))
        for row in (each for each in rows if each["network"] == name):
            if "failed" in row:
                print(f"{row['contender']:46} failed: {row['failed']}")
                continue
            slots = f", {row['slots']} slot{'s' if row['slots'] > 1 else ''}" if "slots" in row else ""
            bits = "" if row.get("same_bits", True) else " (other bits)"
            cells = [
                f"{format(row[key] / unit, form):>11}" if row.get(key) is not None else f"{'-':>11}"
                for _, key, form, unit in COLUMNS
            ]
            print(f"{row['name'] + slots + bits:46}" + " ".join(cells))


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return the device, the cores and the versions of libraries."""
    facts = reporting.machine(options.device, "diffusers", "safetensors", "diffsynth-core")
    return {**facts, "repeats": options.repeats, "page_cache": "warm" if options.warm_cache else "cold"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--library", choices=["diffsynth", "diffusers"], default="diffsynth", help="of the networks")
    parser.add_argument("--contenders", nargs="+", choices=contenders.CONTENDERS, help="default: all but disk on a GPU")
    parser.add_argument("--without", nargs="+", default=[], help="leave out contenders with such names")
    parser.add_argument("--scale", choices=SCALES, help="default: full on a GPU, small on the CPU")
    parser.add_argument("--device", help="default: the first accelerator, else cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2, help="steps before; the first records the order")
    parser.add_argument("--warm-cache", action="store_true", help="do not drop files from the page cache")
    parser.add_argument("--folder", type=Path, help="folder for weights on disk; default: that for temporary files")
    parser.add_argument("--simulate", action="store_true", help="predict, and run nothing")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", choices=contenders.CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = options.device or str(devices.default_device())
    on_cpu = torch.device(options.device).type == "cpu"
    options.scale = options.scale or ("small" if on_cpu else "full")
    options.contenders = options.contenders or [
        name for name in contenders.CONTENDERS if on_cpu or name != "diffsynth disk"
    ]
    options.contenders = [name for name in options.contenders if not any(part in name for part in options.without)]
    return options


def main() -> int:
    """Run the benchmark; return 1 if one of our outputs differs from that of the unmanaged module."""
    options = arguments()
    if options.one:
        print(json.dumps(run_one(options.networks[0], options.one, options)))
        return 0
    report: dict[str, Any] = {**machine(options), "rows": []}
    for name in () if options.simulate else options.networks:
        before, rows = report["rows"], []
        for contender in options.contenders:
            rows += in_a_process(name, contender, options)
            # Written after each contender, so that an interrupted run leaves its figures.
            report["rows"] = before + compare(copy.deepcopy(rows))
            if options.json is not None:
                reporting.write(report, options.json)
            print(f"{name}: {contender} is done", file=sys.stderr)
    show(report["rows"])
    if options.simulate:
        report["simulated"] = curve.simulated(options.scale if options.scale == "tiny" else "full", options.networks)
        print("\n" + "\n".join(curve.show(report["simulated"])))
    if options.json is not None:
        reporting.write(report, options.json)
    wrong = [row for row in report["rows"] if row["contender"] in EXACT and not row.get("same_bits", True)]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
