"""The loading benchmark runs at a tiny size, and all its contenders load the same bits."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loading.py"


def test_it_runs_and_its_contenders_load_the_same_bits(tmp_path):
    command = [sys.executable, BENCHMARK, "--size-gb", "0.05", "--repeats", "1", "--folder", tmp_path]
    command += ["--contenders", "raw read", "load_file", "diffsynth", "--states", "warm", "--json", tmp_path / "x.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert 0.03e9 < report["bytes"] < 0.08e9
    cases = report["cases"]
    assert {"raw read | cpu | warm", "load_file | cpu | warm", "diffsynth | cpu | warm"} <= set(cases)
    assert all(0 < case["of_which_loading"] < case["seconds"] for case in cases.values())
    assert 0.9 < cases["diffsynth | cpu | warm"]["anonymous_of_model"] < 1.3
    assert 0.9 < cases["load_file | cpu | warm"]["file_backed_of_model"] < 1.3
    assert "diffsynth | cpu | warm" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
