"""The attention benchmark runs in Triton's interpreter, and checks results before it times them."""

import json
import sys

import pytest

from benchmark_scripts import benchmark_script
from diffsynth.core.device.speed import Speed


@pytest.fixture(scope="module")
def benchmark():
    with benchmark_script("attention") as module:
        module.compute_speed = lambda device, dtype: Speed(1e9, measured=False, source="not measured in a test")
        yield module


def run(benchmark, monkeypatch, file, *more):
    settings = ["--device", "cpu", "--dtype", "float32", "--tiny", "--repeats", "1", "--warmup", "0"]
    monkeypatch.setattr(sys, "argv", ["attention.py", *settings, "--json", str(file), *more])
    return benchmark.main(), json.loads(file.read_text())


def test_it_times_what_is_right_and_says_what_refuses(benchmark, monkeypatch, tmp_path):
    contenders = ["--contenders", "triton", "sdpa", "sdpa_flash", "flash_attention_3", "--cases", "padded"]
    code, report = run(benchmark, monkeypatch, tmp_path / "x.json", *contenders)
    assert code == 0
    assert report["wrong"] == {}
    case = report["cases"]["tiny, padded | bwd"]
    assert {"triton", "sdpa"} <= set(case["contenders"])
    assert case["left_out"]["flash_attention_3"].startswith("refuses: ")
    assert case["flop"] == 10 * 40 * 13 * 16 * 2


def test_a_wrong_contender_is_not_timed(benchmark, monkeypatch, tmp_path):
    real = benchmark.attention

    def scaled(*tensors, backend, **arguments):
        return real(*tensors, backend="naive", **arguments) * (1.01 if backend == "triton" else 1)

    monkeypatch.setattr(benchmark, "attention", scaled)
    code, report = run(
        benchmark, monkeypatch, tmp_path / "x.json", "--contenders", "triton", "sdpa", "--cases", "packed"
    )
    assert code == 1
    assert "out off by 1.0e-02" in report["wrong"]["triton"]["tiny"]
    assert all(set(case["contenders"]) == {"sdpa"} for case in report["cases"].values())


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({}, 20),
        ({"causal": True}, 2 + 3 + 4 + 5),
        ({"window": (1, 0)}, 8),
        ({"padded": 2}, 12),
        ({"packed": (1, 3)}, 10),
    ],
)
def test_pairs_are_counted(benchmark, settings, pairs):
    assert benchmark.Case("x", 4, 5, 1, 1, **settings).pairs() == pairs
