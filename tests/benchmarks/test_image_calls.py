"""The benchmarks of FLUX, Qwen-Image and Z-Image run at a tiny size, with our library and with diffusers."""

import json

import pytest
import torch

from benchmark_scripts import benchmark_script


@pytest.fixture(scope="module", params=["flux", "qwen_image", "z_image"])
def script(request):
    with benchmark_script(request.param) as module:
        yield module


def options(script, *given):
    return script.image_calls.arguments(script.BENCHMARK, None, ["--repeats", "1", *given])


def test_both_take_turns(script):
    for case in script.TINY.values():
        rows = script.image_calls.in_turns(case, options(script, "--tiny", "--warmup", "0"))
        assert [row["contender"] for row in rows] == ["diffsynth", "diffusers"]
        assert all(0 < row["gap_seconds"] < row["cpu_seconds"] for row in rows)
        ours, theirs = (row["cpu_seconds"] for row in rows)
        assert rows[0]["ratio"] == pytest.approx(ours / theirs)


@pytest.mark.parametrize("library", ["diffsynth", "diffusers"])
def test_one_alone(script, library, monkeypatch, capsys):
    """The process that a run at published sizes starts for a contender; its last line is the row."""
    name, case = list(script.TINY.items())[-1]
    monkeypatch.setattr("sys.argv", ["", "--tiny", "--repeats", "1", "--one", library, "--cases", name])
    assert script.image_calls.main(script.BENCHMARK, None) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["contender"] == library
    assert row["seconds"] > row["seconds_per_step"]
    assert row["steps"] == case.steps
    assert row["memory"] is None or row["memory"] > 0


def test_the_process_of_a_contender_on_a_gpu(script, monkeypatch):
    """It gets device, case, contender and repeats; one that fails has its reason in its row."""
    calls, name = script.image_calls, list(script.FULL)[-1]
    seen = []

    def run_alone(path, *given):
        seen.append((path, options(script, *given)))
        return ({"seconds": 1.0}, None) if len(seen) == 1 else (None, "exit code 1")

    monkeypatch.setattr(calls.reporting, "run_alone", run_alone)
    run = [calls.in_a_process(script.BENCHMARK, name, "diffsynth-compiled", options(script, "--device", "cuda"))
           for _ in range(2)]  # fmt: skip
    assert run == [{"case": name, "seconds": 1.0},
                   {"case": name, "contender": "diffsynth-compiled", "failed": "exit code 1"}]  # fmt: skip
    path, given = seen[0]
    assert path == script.__file__
    assert (given.one, given.cases, given.device, given.repeats) == ("diffsynth-compiled", [name], "cuda", 1)


def test_both_have_the_same_networks(script):
    """Numbers of parameters, counted on meta."""
    for cases in (script.FULL, script.TINY):
        for case in cases.values():
            configs = case.line.configs(case.sizes)
            with torch.device("meta"):
                ours, theirs = case.line.our_networks(configs), case.line.their_networks(configs)
            counts = [sorted(sum(p.numel() for p in each.parameters()) for each in parts.values())
                      for parts in (ours, theirs)]  # fmt: skip
            assert counts[0] == counts[1]


def test_the_recorded_figures_meet_our_bounds(script):
    """Between two forward passes at most 1 ms, and no call slower than diffusers'."""
    calls = script.image_calls
    report = json.loads((calls.RESULTS / f"{script.BENCHMARK.name}-tiny.json").read_text(encoding="utf-8"))
    ours = [row for row in report["rows"] if row["contender"] == "diffsynth"]
    assert [row["case"] for row in ours] == list(script.TINY)
    assert max(row["gap_seconds"] for row in ours) <= 1e-3
    assert max(row["ratio"] for row in ours) <= 1.0
    assert report["threads"] == 1


def test_the_goal_stands_below_figures_at_full_size(script):
    name, seconds = list(script.BENCHMARK.goals.items())[-1]
    rows = [
        {"case": name, "contender": "diffsynth", "seconds": 0.5, "seconds_per_step": 0.1, "memory": 2**30},
        {"case": name, "contender": "diffusers-compiled", "failed": "exit code 1"},
    ]
    text = "\n".join(script.image_calls.show(script.BENCHMARK, rows))
    assert "failed: exit code 1" in text
    assert f"goal on one H200: {name} {seconds} s a call" in text
