"""Time that `import diffsynth` and `registry.list()` add to a bare interpreter: medians over new processes.

    python benchmarks/import_time.py [--repeats 15] [--json FILE]

Goals: 30 ms for the import, 100 ms with the list, all six packages installed. A benchmark, never a timed test.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "bare interpreter": "pass",
    "import diffsynth": "import diffsynth",
    "registry.list()": "import diffsynth; diffsynth.registry.list()",
}
GOALS_MS = {"import diffsynth": 30.0, "registry.list()": 100.0}


def run(code: str) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of a new interpreter; only CPU seconds are reliable on a busy machine."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(repeats: int) -> dict[str, dict[str, float | None]]:
    for code in CASES.values():
        run(code)  # writes the .pyc files
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(repeats):  # interleaved, so that a busy moment affects every case
        for name, code in CASES.items():
            times[name].append(run(code))
    medians = {
        name: [1000 * statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()
    }
    bare = medians["bare interpreter"]
    return {
        name: {
            "wall_ms": wall,
            "added_wall_ms": wall - bare[0],
            "added_cpu_ms": cpu - bare[1],
            "goal_ms": GOALS_MS.get(name),
        }
        for name, (wall, cpu) in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    figures = measure(options.repeats)
    print(f"{'case':20} {'wall ms':>9} {'added':>9} {'added cpu':>10} {'goal':>6}")
    for name, row in figures.items():
        goal = f"{row['goal_ms']:.0f}" if row["goal_ms"] else "-"
        print(f"{name:20} {row['wall_ms']:9.1f} {row['added_wall_ms']:9.1f} {row['added_cpu_ms']:10.1f} {goal:>6}")
    if options.json:
        options.json.write_text(json.dumps({"python": sys.version, "cases": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
