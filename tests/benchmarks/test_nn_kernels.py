"""The benchmark of the fused kernels runs on the CPU, and their default configs compile for GPUs that are not here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "nn_kernels.py"


def test_every_case_equals_its_twin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--tiny", "--json", str(tmp_path / "x.json")])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len({row["case"] for row in rows}) == 9
    assert all(row["error"] < 1e-4 and row["kernel_us"] > 0 for row in rows)
    assert "rms norm of all heads, rope" in capsys.readouterr().out


def test_default_configs_compile_and_do_not_spill(tmp_path):
    """Builds at the widths of Z-Image, FLUX and Wan, in a process whose kernels are not interpreted: importing torch
    anew takes most of the time, and compiling the rest where Triton's cache is cold.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCHMARK, "--offline", "80", "90", "--json", tmp_path / "x.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) >= 22
    assert [row for row in rows if row["problems"] or row["spilled"] or row["registers"] > 128] == []
