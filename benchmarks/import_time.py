"""Time that imports, `registry.list()` and a whole `diffsynth generate` take: medians over new processes.

    python benchmarks/import_time.py [--repeats 9] [--distributions 100] [--json FILE]

Goals, with all six packages installed and the bytecode of all modules written: `import diffsynth` adds 30 ms to a bare
interpreter, and `registry.list()` 100 ms, each with a hundred distributions more; `diffsynth generate z-image-nano`
takes 1.5 s more than `import torch`. On CPUs that lack instructions for bfloat16, its arithmetic takes most of the
time, so the process is also measured in float32. A benchmark, never a timed test.

Rows of `LIBRARIES` show what other imports take. Each process has one thread. On a busy machine only CPU seconds, and
their ratio to those of `import torch`, can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One program.

    Args:
        code: of the program; `OUT` is a file that it may write.
        base: name of the case that its goal adds to.
        goal_ms: milliseconds of CPU time that it may add to `base`; None without a goal.
    """

    code: str
    base: str = "bare interpreter"
    goal_ms: float | None = None


BARE, TORCH = "bare interpreter", "import torch"
GENERATE = "from diffsynth.cli import main; main(['generate', 'z-image-nano', 'a red apple', '-o', OUT, *{options}])"
CASES = {
    BARE: Case("pass"),
    "import diffsynth": Case("import diffsynth", goal_ms=30),
    "registry.list()": Case("import diffsynth; diffsynth.registry.list()", goal_ms=100),
    TORCH: Case("import torch"),
    "generate": Case(GENERATE.format(options=[]), base=TORCH, goal_ms=1500),
    "generate --dtype float32": Case(GENERATE.format(options=["--dtype", "float32"]), base=TORCH, goal_ms=1500),
}
LIBRARIES = {
    "import ...AutoTokenizer": Case("from transformers import AutoTokenizer", base=TORCH),
    "import ...Qwen3Model": Case("from transformers import Qwen3Model", base=TORCH),
    "import ...ZImagePipeline": Case("from diffusers import ZImagePipeline", base=TORCH),
}
"""Imports of transformers and diffusers that a Z-Image call with diffusers needs."""


def write_distributions(folder: Path, count: int) -> None:
    """Write the metadata of `count` distributions to `folder`; every other one has a command, and none is a plugin."""
    for index in range(count):
        info = folder / f"fake_{index}-1.{index}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{index}\nVersion: 1.{index}\n")
        (info / "RECORD").write_text("".join(f"fake_{index}/module_{line}.py,,\n" for line in range(100)))
        if index % 2:
            (info / "entry_points.txt").write_text(f"[console_scripts]\nfake-{index} = fake_{index}:main\n")


def run(code: str, environment: Mapping[str, str]) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of a new interpreter."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(cases: Mapping[str, Case], repeats: int, distributions: int) -> dict[str, dict[str, float | None]]:
    """Return a dict case -> figures, in milliseconds: medians of new processes, which run in turn.

    Args:
        cases: with all the cases that they are compared with.
        repeats: number of processes of each case.
        distributions: number of distributions that are installed besides those of this environment.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "site").mkdir()
        write_distributions(folder / "site", distributions)
        environment = os.environ | {
            "PYTHONPATH": str(folder / "site"),
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", str(folder / "bytecode")),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        programs = {key: case.code.replace("OUT", repr(str(folder / "x.png"))) for key, case in cases.items()}
        for code in programs.values():
            run(code, environment)  # writes the bytecode, and reads the files into memory
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in cases}
        for _ in range(repeats):  # interleaved, so that a busy moment affects every case
            for key, code in programs.items():
                times[key].append(run(code, environment))
    medians = {
        key: tuple(1000 * statistics.median(column) for column in zip(*rows, strict=True))
        for key, rows in times.items()
    }
    return {
        key: {
            "wall_ms": wall,
            "cpu_ms": cpu,
            "added_cpu_ms": cpu - medians[cases[key].base][1],
            "goal_ms": cases[key].goal_ms,
            "ratio_to_torch": cpu / medians[TORCH][1] if TORCH in medians else None,
        }
        for key, (wall, cpu) in medians.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--distributions", type=int, default=100, help="installed besides those of this environment")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *LIBRARIES], default=[*CASES, *LIBRARIES])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    every = CASES | LIBRARIES
    wanted = {BARE, *options.cases, *(every[key].base for key in options.cases)}
    cases = {key: case for key, case in every.items() if key in wanted}
    figures = measure(cases, options.repeats, options.distributions)
    print(f"{'case':26} {'wall ms':>9} {'cpu ms':>9} {'added cpu':>10} {'goal':>6} {'/ torch':>8}")
    for key, row in figures.items():
        goal = f"{row['goal_ms']:.0f}" if row["goal_ms"] else "-"
        numbers = f"{row['wall_ms']:9.0f} {row['cpu_ms']:9.0f} {row['added_cpu_ms']:10.0f} {goal:>6}"
        ratio = f"{row['ratio_to_torch']:.2f}" if row["ratio_to_torch"] else "-"
        print(f"{key:26} {numbers} {ratio:>8}")
    if options.json:
        report = {
            "python": sys.version,
            "cores": os.cpu_count(),
            "repeats": options.repeats,
            "distributions": options.distributions,
            "added_to": {key: case.base for key, case in cases.items()},
            "cases": figures,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
