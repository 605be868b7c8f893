"""The GPU script lists existing parts, stays within its time limits, and runs every benchmark."""

import re
import subprocess
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WITHOUT_A_GPU = {
    *("fuzz_calls.py", "fuzz_files.py", "image_calls.py", "import_time.py", "recognize.py", "reporting.py"),
    "rounded_times.py",
}


def run(*arguments):
    return subprocess.run([BENCHMARKS / "gpu.sh", *arguments], capture_output=True, text=True, check=False)


def test_all_parts_fit_ten_minutes_each_and_thirty_together():
    result = run("--dry-run", "all")
    assert result.returncode == 0, result.stderr
    limits = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert len(limits) == len(run("--list").stdout.split())
    assert max(limits) <= 600
    assert sum(limits) <= 1800


def test_every_benchmark_and_the_tests_are_run():
    commands = run("--dry-run", "all").stdout
    assert "pytest tests/gpu" in commands
    there = {file.name for file in BENCHMARKS.glob("*.py")} - WITHOUT_A_GPU
    assert there <= set(re.findall(r"benchmarks/(\w+\.py)", commands))


def test_one_part_alone_and_no_other_names():
    assert run("--dry-run", "vram-flux").stdout.count("\n") == 1
    result = run("--dry-run", "vram-flax")
    assert result.returncode == 2
    assert "there is no part vram-flax; expected all, qwen-image" in result.stderr
    assert run().returncode == 2
