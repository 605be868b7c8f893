"""Time to load a component from files until its last element was used, by diffsynth and others on the same files.

    python benchmarks/loading.py [--size-gb 4] [--repeats 3] [--folder DIR] [--json FILE]

A Z-Image network of random bits in 8 shards is written to a folder, loaded by each method in a process of its own with
a warm and a cold page cache, and deleted. The time is measured from opening the first file until every element has been
summed in its final dtype and on its final device; otherwise a mapping would count before it has read anything. Imports
and device contexts are made before. Memory is the growth of the process during that time, anonymous and file-backed
(the page cache) separately. Results are medians of the repeats.

Goals on the CPU: 0.9 of the speed of a plain read into new memory; 1.0 of `safetensors.torch.load_file` with a warm
cache and 1.5 with a cold one; anonymous memory of at most the model and 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

SHARDS = 8
STATES = ("warm", "cold")
STEM = "diffusion_pytorch_model"


def config_of(size_gb: float) -> Any:
    """Return the config of a Z-Image network of about this size in bf16, of the published width if possible."""
    from diffsynth_zimage.config import ZImageDiTConfig

    heads = next((heads for heads, least in ((30, 2.5), (12, 0.3)) if size_gb >= least), 3)
    layer = 2 * 12.27 * (128 * heads) ** 2 / 1e9
    return ZImageDiTConfig(
        dim=128 * heads, n_heads=heads, n_kv_heads=heads, n_layers=max(round(size_gb / layer) - 4, 1)
    )


def write_checkpoint(folder: Path, size_gb: float) -> int:
    """Write the shards, their index and diffusers' config; return the bytes of all tensors."""
    import torch
    from safetensors.torch import save_file

    from diffsynth_zimage.dit import ZImageDiT

    config = config_of(size_gb)
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in ZImageDiT(config).state_dict().items()}
    total = sum(2 * prod(shape) for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    done = 0
    for key, shape in shapes.items():
        shards[min(done * SHARDS // total, SHARDS - 1)][key] = shape
        done += 2 * prod(shape)
    names = [f"{STEM}-{n + 1:05d}-of-{SHARDS:05d}.safetensors" for n in range(SHARDS)]
    for name, shard in zip(names, shards, strict=True):
        # Random bits of finite numbers suffice: nothing computes with them.
        tensors = {
            key: torch.randint(0, 0x7F80, shape, dtype=torch.int16).view(torch.bfloat16) for key, shape in shard.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    theirs = {name: getattr(config, name) for name in ("dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads")}
    (folder / "config.json").write_text(json.dumps({"_class_name": "ZImageTransformer2DModel", **theirs}))
    return total


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def raw_read(folder: Path, device: str, *, threads: int) -> list[Any]:
    """Read all bytes of the files into new memory."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    def read(file: Path) -> Any:
        buffer = torch.empty(file.stat().st_size // 8 * 8, dtype=torch.uint8)
        left = memoryview(buffer.numpy())
        with file.open("rb", buffering=0) as stream:
            while left and (count := stream.readinto(left[: 2**24])):
                left = left[count:]
        return buffer

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read, shards_in(folder)))


def load_file(folder: Path, device: str) -> list[Any]:
    from safetensors.torch import load_file

    return [tensor for file in shards_in(folder) for tensor in load_file(file, device=device).values()]


def diffusers(folder: Path, device: str) -> list[Any]:
    import torch
    from diffusers import ZImageTransformer2DModel

    options = {} if device == "cpu" else {"device_map": device}
    module = ZImageTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, trust_remote_code=False, **options
    )
    return list(module.state_dict().values())


def diffsynth(folder: Path, device: str, *, copy: bool) -> list[Any]:
    import torch

    from diffsynth import _discovery
    from diffsynth.core.loader import component, recognize
    from diffsynth.core.loader.checkpoint import read_files

    tensors = read_files(shards_in(folder))
    (found,) = recognize.recognize(tensors, *_discovery.catalog().layouts())
    module = component.load_component(found, tensors, device=device, dtype=torch.bfloat16, copy=copy)
    return list(module.state_dict().values())


CONTENDERS: dict[str, tuple[Callable[[Path, str], list[Any]], str]] = {
    "raw read": (lambda folder, device: raw_read(folder, device, threads=1), "torch"),
    "raw read, 4 threads": (lambda folder, device: raw_read(folder, device, threads=4), "torch"),
    "load_file": (load_file, "safetensors.torch"),
    "diffusers": (diffusers, "diffusers.models.transformers.transformer_z_image"),
    "diffsynth": (lambda folder, device: diffsynth(folder, device, copy=True), "diffsynth.runtime.pretrained"),
    "diffsynth, mapped": (lambda folder, device: diffsynth(folder, device, copy=False), "diffsynth.runtime.pretrained"),
}
"""Name -> (load function, module to import before the measurement)."""

ON_CPU_ALONE = ("raw read", "raw read, 4 threads", "diffsynth, mapped")


def consume(tensors: Iterable[Any]) -> int:
    import torch

    total = 0
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() * flat.element_size() % 8 == 0
        total += int(flat.view(torch.int64 if whole else torch.int16).sum())
    return total % 2**63


class PeakMemory:
    """Peak growth of this process's anonymous and file-backed memory, sampled every 4 ms."""

    def __enter__(self) -> PeakMemory:
        self._before = self._now()
        self.peak = self._before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self.growth = {kind: self.peak[kind] - self._before[kind] for kind in self.peak}

    def _watch(self) -> None:
        while not self._done.wait(0.004):
            self._look()

    def _look(self) -> None:
        now = self._now()
        self.peak = {kind: max(self.peak[kind], now[kind]) for kind in now}

    @staticmethod
    def _now() -> dict[str, int]:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return {kind: 1024 * int(fields[f"Rss{kind}"].split()[0]) for kind in ("Anon", "File")}


def run_one(name: str, folder: Path, device: str) -> dict[str, Any]:
    """Import everything, then measure one load; called in a process of its own."""
    import importlib

    import torch

    load, module = CONTENDERS[name]
    importlib.import_module(module)
    if name.startswith("diffsynth"):
        from diffsynth import _discovery

        importlib.import_module("diffsynth_zimage.dit")
        _discovery.catalog().layouts()
    consume([torch.ones(8, device=device)])
    with PeakMemory() as memory:
        started = time.perf_counter()
        tensors = load(folder, device)
        loaded = time.perf_counter() - started
        checksum = consume(tensors)
        seconds = time.perf_counter() - started
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {"seconds": seconds, "loaded": loaded, "checksum": checksum, "bytes": size, **memory.growth}


def set_cache(folder: Path, state: str) -> None:
    for file in shards_in(folder):
        with file.open("rb", buffering=0) as stream:
            if state == "warm":
                while stream.read(2**24):
                    pass
            else:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return "method | device | state" -> runs; methods alternate, so that other load affects all of them."""
    from diffsynth.core import device as devices

    kinds = dict.fromkeys(("cpu", devices.get_device_name()))
    cases = [
        (name, device, state)
        for device in kinds
        for state in options.states
        for name in options.contenders
        if device == "cpu" or name not in ON_CPU_ALONE
    ]
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for name, device, state in cases:
            set_cache(folder, state)
            command = [sys.executable, __file__, "--folder", folder, "--one", name, "--device", device]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.setdefault(f"{name} | {device} | {state}", []).append(json.loads(result.stdout.splitlines()[-1]))
    sums = {run["checksum"] for case, several in runs.items() if "raw" not in case for run in several}
    if len(sums) > 1:
        raise SystemExit(f"the methods did not load the same bits: {runs}")
    return runs


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    rows = {}
    for case, several in runs.items():
        median = {key: statistics.median(run[key] for run in several) for key in several[0] if key != "checksum"}
        rows[case] = {
            "gb_per_s": median["bytes"] / median["seconds"] / 1e9,
            "seconds": median["seconds"],
            "of_which_loading": median["loaded"],
            "anonymous_of_model": median["Anon"] / median["bytes"],
            "file_backed_of_model": median["File"] / median["bytes"],
        }
    for case, row in rows.items():
        _, device, state = case.split(" | ")
        for name, key in (("raw read", "of_raw_read"), ("load_file", "of_load_file")):
            other = rows.get(f"{name} | {device} | {state}")
            if other is not None:
                row[key] = row["gb_per_s"] / other["gb_per_s"]
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    heads = f"{'GB/s':>6} {'s':>7} {'/raw':>6} {'/load_file':>10} {'anon':>6} {'file':>6}"
    print(f"{'method | device | page cache':38} {heads}")
    for case, row in rows.items():
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("of_raw_read", "of_load_file")]
        memory = f"{row['anonymous_of_model']:6.2f} {row['file_backed_of_model']:6.2f}"
        print(f"{case:38} {row['gb_per_s']:6.2f} {row['seconds']:7.3f} {ratios[0]:>6} {ratios[1]:>10} {memory}")
    print("anon, file: growth of the process's memory at its peak, in units of the model")


def machine() -> dict[str, Any]:
    import torch

    from diffsynth.core import device as devices

    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": devices.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for the temporary checkpoint")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), help="states of the page cache")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.one:
        print(json.dumps(run_one(options.one, options.folder, options.device)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_checkpoint(Path(folder), options.size_gb)
        rows = summary(measure(Path(folder), options))
    show(rows)
    if options.json:
        report = {"bytes": size, "shards": SHARDS, "repeats": options.repeats, "machine": machine(), "cases": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
