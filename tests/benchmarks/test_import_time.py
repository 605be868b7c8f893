"""The benchmark of imports measures programs that do what their names say."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "import_time.py"


def test_it_measures_with_more_distributions_installed(tmp_path):
    command = [sys.executable, BENCHMARK, "--repeats", "1", "--distributions", "20", "--json", tmp_path / "x.json"]
    command += ["--cases", "import diffsynth", "registry.list()"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["distributions"] == 20
    assert list(report["cases"]) == ["bare interpreter", "import diffsynth", "registry.list()"]
    for name, row in report["cases"].items():
        assert row["cpu_ms"] > 0
        assert row["added_cpu_ms"] == row["cpu_ms"] - report["cases"][report["added_to"][name]]["cpu_ms"]
        assert name in result.stdout
