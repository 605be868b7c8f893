"""The benchmark of rounded times: on a tiny network, exact times are nearer to float32 than rounded ones."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "rounded_times.py"


def test_exact_times_are_nearer_to_float32(tmp_path):
    command = [sys.executable, BENCHMARK, "--models", "wan2.1-t2v-1.3b", "--steps", "4", "--seeds", "1"]
    result = subprocess.run([*command, "--json", tmp_path / "x.json"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "x.json").read_text())["models"]["wan2.1-t2v-1.3b"]
    assert 0 < figures["bfloat16"] < 0.03 < figures["bfloat16 rounded"] < 0.15
    assert figures["apart"] > figures["bfloat16"]
    assert figures["float32 rounded"] > 0.03
