"""Who holds the weights, and how: no management, ours policy by policy, and diffusers' hooks. Each is timed here."""

from __future__ import annotations

import gc
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from offload.curve import SHARES, turns, workload
from offload.networks import Network
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffsynth.core import device as devices
from diffsynth.core.planning import Speeds, Workload
from diffsynth.core.planning.planner import spread
from diffsynth.core.vram import Policy, wrap
from diffsynth.core.vram.managed import ManagedModule
from diffsynth.errors import Unplannable

FP8 = torch.float8_e4m3fn
GROUPS = (1, 4)
"""Blocks in a group of diffusers' block-level offload; with streams two groups are on the device at once."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders.

    Args:
        network: that is run.
        device, dtype: of computation.
        repeats, warmup: steps that are timed, and those before.
        folder: for weights on disk.
        cold: the files are dropped from the page cache before each step.
        load: the network's sizes and operations; None if it cannot be rehearsed.
    """

    network: Network
    device: torch.device
    dtype: torch.dtype
    repeats: int
    warmup: int
    folder: Path
    cold: bool = True
    load: Workload | None = None

    def build(self) -> nn.Module:
        """The network with its random weights, on the device."""
        return self.network.build(self.device, self.dtype)


def traced(network: Network, device: torch.device, dtype: torch.dtype) -> Workload | None:
    """Sizes and operations of a step; None if its code asks for values."""
    try:
        return workload(network, device.type, dtype)
    except Unplannable:
        return None


def resident(setting: Setting) -> Iterator[dict[str, Any]]:
    """No management: everything is on the device."""
    module = setting.build()
    row = measure(setting, module)
    yield {"name": "resident", "stays": 1.0, "moved": 0, "predicted": _predicted(setting, None, 0)} | row


def ours(setting: Setting, preset: str) -> Iterator[dict[str, Any]]:
    """One preset of ours, share by share of resident blocks; on the CPU weights in memory are where they are used."""
    module = setting.build()
    source = _source(module, setting.folder / "ours") if preset == "disk" else None
    policy = Policy.preset(preset, setting.device, setting.dtype)
    wrapped = wrap(module, policy, source=source, smallest=setting.network.smallest)
    in_place = setting.device.type == "cpu" and preset != "disk"
    names = wrapped.blocks
    settings = [(1.0, 2)] if in_place else [(0.0, 1), *((share, 2) for share in SHARES)]
    for share, slots in settings:
        kept = frozenset(names[index] for index in spread(round(share * len(names)), len(names)))
        wrapped.configure(resident=None if share == 1.0 else kept, slots=slots)
        with wrapped:
            row = measure(setting, module, files=setting.folder / "ours", report=wrapped)
        row |= _simulation(setting, wrapped, kept)
        yield {"name": f"diffsynth {preset}", "stays": share, "slots": slots} | row
    wrapped.unwrap()


def theirs_groups(setting: Setting, level: str) -> Iterator[dict[str, Any]]:
    """diffusers' group offload: with streams on an accelerator, from disk on the CPU, where it has none."""
    from diffusers.hooks import apply_group_offloading

    on_cpu = setting.device.type == "cpu"
    for count in GROUPS if level == "block_level" else (None,):
        module = setting.build()
        whole = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
        folder = setting.folder / f"{level}-{count}"
        how: dict[str, Any] = {"use_stream": True, "record_stream": True}
        if on_cpu:
            how = {"offload_to_disk_path": str(folder)}
        apply_group_offloading(module, setting.device, torch.device("cpu"), level, num_blocks_per_group=count, **how)
        row = measure(setting, module, files=folder)
        tail = "" if count is None else f", groups of {count}"
        yield {"name": f"diffusers {level}{tail}{', disk' if on_cpu else ''}", "stays": 0.0, "moved": whole} | row
        del module
        gc.collect()  # its hooks hold each other
        devices.empty_cache(setting.device)


def theirs_casting(setting: Setting) -> Iterator[dict[str, Any]]:
    """diffusers' storage in fp8: every layer is cast when it runs, all are on the device."""
    from diffusers.hooks import apply_layerwise_casting

    module = setting.build()
    apply_layerwise_casting(module, storage_dtype=FP8, compute_dtype=setting.dtype)
    yield {"name": "diffusers fp8", "stays": 1.0, "moved": 0} | measure(setting, module)


CONTENDERS: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "resident": resident,
    "diffsynth cpu-offload": lambda setting: ours(setting, "cpu-offload"),
    "diffsynth fp8": lambda setting: ours(setting, "fp8"),
    "diffsynth disk": lambda setting: ours(setting, "disk"),
    "diffusers block_level": lambda setting: theirs_groups(setting, "block_level"),
    "diffusers leaf_level": lambda setting: theirs_groups(setting, "leaf_level"),
    "diffusers fp8": theirs_casting,
}


def measure(
    setting: Setting, module: nn.Module, *, files: Path | None = None, report: ManagedModule | None = None
) -> dict[str, Any]:
    """Median seconds of a step, peaks of memory, a digest of the output, and what the report of ours says."""
    device = setting.device
    inputs = setting.network.draw(device, setting.dtype)
    kept = tuple(files.glob("*.safetensors")) if files is not None and files.is_dir() and setting.cold else ()
    times, work, output = [], [], None
    for step in range(setting.warmup + setting.repeats):
        if step == setting.warmup:
            devices.reset_peak_memory("cpu")
            devices.reset_peak_memory(device)
            if report is not None:
                report.report.settle()
                report.report.clear()
        _forget(kept)
        devices.synchronize(device)
        started, busy = time.perf_counter(), time.process_time()
        with torch.no_grad():
            output = module(**inputs)
        devices.synchronize(device)
        times.append(time.perf_counter() - started)
        work.append(time.process_time() - busy)
    row: dict[str, Any] = {
        "seconds": statistics.median(times[setting.warmup :]),
        "fastest": min(times[setting.warmup :]),
        "cpu_seconds": statistics.median(work[setting.warmup :]),
        "peak_vram": None if device.type == "cpu" else devices.peak_memory(device),
        "peak_ram": devices.peak_memory("cpu"),
        "digest": _digest(output),
    }
    if report is not None:
        told = report.report.settle()
        row |= {
            "moved": told.bytes_moved / setting.repeats,
            "bytes_per_second": told.bytes_per_second,
            "hidden_by_report": told.hidden_share,
            "misses": told.misses,
        }
    return row


def _simulation(setting: Setting, wrapped: ManagedModule, kept: frozenset[str]) -> dict[str, Any]:
    """What a plan predicts of memory, and what a simulation of the schedule starts from."""
    if setting.load is None:
        return {}
    here = frozenset(wrapped.blocks) - frozenset(wrapped.streamed) | kept
    component = wrapped.footprint("net")
    activations = setting.load.stages[0].activations
    sizes = {block.name: block.stored for block in component.blocks if block.name not in here}
    flow = [(turn.compute, sizes.get(run.block, 0)) for turn, run in _paired(setting.load)]
    weights = component.on_device(here, slots=wrapped.slots)
    return {"predicted": weights + activations, "flow": flow}


def _paired(load: Workload) -> Iterator[tuple[Any, Any]]:
    one = Speeds(link=1.0, compute=1.0, disk=1.0)
    return zip(turns(load, frozenset(), one), load.stages[0].runs, strict=True)


def _predicted(setting: Setting, here: frozenset[str] | None, slots: int) -> int | None:
    if setting.load is None:
        return None
    (component,) = setting.load.components
    names = frozenset(block.name for block in component.blocks)
    return component.on_device(names if here is None else here, slots=slots) + setting.load.stages[0].activations


def _source(module: nn.Module, folder: Path) -> Any:
    """The module's weights in one file, as the loader would hand them on."""
    from safetensors.torch import save_file

    from diffsynth.core.loader import convert
    from diffsynth.core.loader.checkpoint import read_files
    from diffsynth.core.loader.reader.source import ComponentSource

    tensors = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    found = read_files([folder / "model.safetensors"])
    return ComponentSource(
        found, convert.plan((), found.shapes).targets, {name: tensor.dtype for name, tensor in tensors.items()}
    )


def _forget(files: tuple[Path, ...]) -> None:
    """Have the system drop these files from its page cache; what is mapped at the moment stays."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest(output: Any) -> str:
    tensor: Tensor = pytree.tree_leaves(output)[0].detach().cpu().contiguous()
    if not bool(tensor.float().isfinite().all()):
        raise SystemExit("the output is not finite; nothing that was timed means anything")
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
