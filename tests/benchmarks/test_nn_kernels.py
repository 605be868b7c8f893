"""The benchmark of fused kernels runs on the CPU, and every kernel equals its reference implementation."""

import json
import runpy
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "nn_kernels.py"


def test_every_case_equals_its_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--tiny", "--json", str(tmp_path / "x.json")])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len({row["case"] for row in rows}) == 9
    assert all(row["error"] < 1e-4 and row["kernel_us"] > 0 for row in rows)
    assert "rms norm of all heads, rope" in capsys.readouterr().out
