"""Time of `diffsynth recognize`, as a whole process, on checkpoints of real size and layout.

    python benchmarks/recognize.py [--repeats 15] [--json FILE]

The files are sparse: they have real headers and lengths, and take no disk space. Goal: 300 ms for a 20B network in 9
shards, whether it is recognised or the error is explained.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

LAYOUTS = Path(__file__).resolve().parents[1] / "tests" / "data" / "layouts"
CASES = {
    "Z-Image-Turbo, 6B in 3 shards": ("Z-Image-Turbo--z_image_dit", 3),
    "Qwen-Image, 20B in 9 shards": ("Qwen-Image--qwen_image_dit", 9),
}
BARE = "bare interpreter"
GOAL_MS = 300.0


def write_checkpoint(folder: Path, layout: str, shards: int) -> None:
    """Write a layout as sparse bf16 safetensors files of full length, with an index."""
    tensors = json.loads(gzip.decompress((LAYOUTS / f"{layout}.json.gz").read_bytes()))["tensors"]
    share = sum(2 * prod(shape) for shape in tensors.values()) / shards
    parts: list[dict[str, dict[str, object]]] = [{}]
    end = 0
    for key, shape in tensors.items():
        if end >= share and len(parts) < shards:
            parts.append({})
            end = 0
        size = 2 * prod(shape)
        parts[-1][key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(parts):05d}.safetensors"
        text = json.dumps(part).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in part.values()))
        weight_map |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def run(command: list[str]) -> tuple[float, float, str]:
    """Return wall and CPU milliseconds of a process, and its output. CPU time is valid on a busy machine, too."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # As in an installation, compiled modules are written beside the sources.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode in (0, 3), result.stderr
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return 1000 * wall, 1000 * cpu, (result.stdout or result.stderr).strip()


def measure(repeats: int, root: Path) -> dict[str, dict[str, object]]:
    commands = {BARE: [sys.executable, "-c", "pass"]}
    for number, (name, (layout, shards)) in enumerate(CASES.items()):
        folder = root / str(number)
        folder.mkdir()
        write_checkpoint(folder, layout, shards)
        commands[name] = [sys.executable, "-c", "from diffsynth.cli import main; main()", "recognize", str(folder)]
    answers = {name: run(command)[2] for name, command in commands.items()}  # also writes the .pyc files
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):  # cases alternate, so that other load affects all of them
        for name, command in commands.items():
            times[name].append(run(command)[:2])
    return {
        name: {
            "wall_ms": statistics.median(wall for wall, _ in rows),
            "cpu_ms": statistics.median(cpu for _, cpu in rows),
            "goal_ms": GOAL_MS if name != BARE else None,
            "answer": answers[name].replace(str(root), "").splitlines()[-1:],
        }
        for name, rows in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        figures = measure(options.repeats, Path(root))
    print(f"{'case':32} {'wall ms':>9} {'cpu ms':>9} {'goal':>6}")
    for name, row in figures.items():
        goal = f"{row['goal_ms']:.0f}" if row["goal_ms"] else "-"
        print(f"{name:32} {row['wall_ms']:9.1f} {row['cpu_ms']:9.1f} {goal:>6}")
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
        options.json.write_text(json.dumps({**machine, "repeats": options.repeats, "cases": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
