"""`examples/any_module.py` at its smallest size; it asserts equal outputs, and this test that bytes were moved."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

FILE = Path(__file__).parents[2] / "examples" / "any_module.py"


def test_it_runs(capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("any_module", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(width=32, layers=3, smallest=0)
    assert "blocks in time, 0 not" in capsys.readouterr().out
    _, report = example.on_disk(tmp_path, 32, 3, torch.zeros(1, 2, dtype=torch.int64), 0)
    assert report.bytes_moved > 0
    assert report.hits >= 3
