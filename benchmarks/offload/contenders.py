"""The contenders, timed: no memory management, our policies, and the hooks of diffusers."""

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
from offload.curve import SHARES, timings, workload
from offload.networks import Network
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffsynth.core import device as devices
from diffsynth.core.planning import Speeds, Workload, spread
from diffsynth.core.vram import Policy, wrap
from diffsynth.core.vram.managed import ManagedModule
from diffsynth.errors import Unplannable

FP8 = torch.float8_e4m3fn
GROUPS = (1, 4)
"""Blocks in a group of diffusers' block-level offload; with streams two groups are on the device at once."""


@dataclass(frozen=True)
class Setting:
    """Settings that all contenders share.

    Args:
        network: the network that is run.
        device: device of computation.
        dtype: dtype of computation.
        repeats: number of steps that are timed.
        warmup: number of steps before these.
        folder: folder for weights on disk.
        cold: files are dropped from the page cache before each step.
        load: sizes and costs of the network; None if it cannot be traced.
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
        """Return the network with its random weights, on the device."""
        return self.network.build(self.device, self.dtype)


def traced(network: Network, device: torch.device, dtype: torch.dtype) -> Workload | None:
    """Return the sizes and costs of a step; None if the network reads values of tensors."""
    try:
        return workload(network, device.type, dtype)
    except Unplannable:
        return None


def resident(setting: Setting) -> Iterator[dict[str, Any]]:
    """Time the network without memory management: everything is on the device."""
    module = setting.build()
    row = measure(setting, module)
    predicted = None
    if setting.load is not None:
        predicted = setting.load.components[0].whole + setting.load.stages[0].activations
    yield {"name": "resident", "stays": 1.0, "moved": 0, "predicted": predicted} | row


def ours(setting: Setting, preset: str) -> Iterator[dict[str, Any]]:
    """Time one of our presets with each share of resident blocks; on the CPU weights in memory are used in place."""
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
    """Time the group offload of diffusers: with streams on an accelerator, from disk on the CPU, which has none."""
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
    """Time the fp8 storage of diffusers: each layer is cast when it runs, and all are on the device."""
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
    """Return the median seconds of a step, peaks of memory, a digest of the output, and figures of our report."""
    device = setting.device
    inputs = setting.network.random_inputs(device, setting.dtype)
    kept = tuple(files.glob("*.safetensors")) if files is not None and files.is_dir() and setting.cold else ()
    times, work, output = [], [], None
    for step in range(setting.warmup + setting.repeats):
        if step == setting.warmup:
            devices.reset_peak_memory("cpu")
            devices.reset_peak_memory(device)
            if report is not None:
                report.report.settle()
                report.report.clear()
        _drop_from_page_cache(kept)
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
        transfers = report.report.settle()
        row |= {
            "moved": transfers.bytes_moved / setting.repeats,
            "bytes_per_second": transfers.bytes_per_second,
            "hidden_by_report": transfers.hidden_share,
            "misses": transfers.misses,
        }
    return row


def _simulation(setting: Setting, wrapped: ManagedModule, kept: frozenset[str]) -> dict[str, Any]:
    """Return the memory that a plan predicts, and the block calls that the schedule is simulated from."""
    if setting.load is None:
        return {}
    on_device = frozenset(wrapped.blocks) - frozenset(wrapped.streamed) | kept
    component = wrapped.footprint("net")
    activations = setting.load.stages[0].activations
    sizes = {block.name: block.stored for block in component.blocks if block.name not in on_device}
    unit = Speeds(link=1.0, compute=1.0, disk=1.0)
    calls = zip(timings(setting.load, frozenset(), unit), setting.load.stages[0].block_calls, strict=True)
    flow = [(timing.compute, sizes.get(call.block, 0)) for timing, call in calls]
    weights = component.on_device(on_device, slots=wrapped.slots)
    return {"predicted": weights + activations, "flow": flow}


def _source(module: nn.Module, folder: Path) -> Any:
    """Write the module's weights to one file, and return a source that reads them."""
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


def _drop_from_page_cache(files: tuple[Path, ...]) -> None:
    """Have the system drop files from its page cache; pages that are mapped at the moment stay."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest(output: Any) -> str:
    tensor: Tensor = pytree.tree_leaves(output)[0].detach().cpu().contiguous()
    if not bool(tensor.float().isfinite().all()):
        raise SystemExit("the output is not finite; nothing that was timed means anything")
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
