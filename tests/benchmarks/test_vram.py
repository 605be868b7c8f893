"""The offloading benchmark runs at a tiny size, and computes its figures from the right rows."""

import argparse
import json
import sys

import pytest

from benchmark_scripts import benchmark_script


@pytest.fixture(scope="module")
def benchmark():
    with benchmark_script("vram") as module:
        yield module


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        device="cpu", scale="tiny", library="diffsynth", repeats=1, warmup=1, folder=tmp_path, warm_cache=False
    )


def test_our_policies_run_the_same_network(benchmark, options):
    contenders = ["resident", "diffsynth cpu-offload", "diffsynth fp8", "diffsynth disk"]
    rows = benchmark.compare([row for name in contenders for row in benchmark.run_one("z-image", name, options)])
    by_name = {(row["name"], row["stays"], row.get("slots")): row for row in rows}
    assert all(row["same_bits"] for row in rows if row["contender"] in benchmark.EXACT)
    assert not by_name["diffsynth fp8", 1.0, 2]["same_bits"]
    nothing, half = by_name["diffsynth disk", 0.0, 2], by_name["diffsynth disk", 0.42, 2]
    assert nothing["moved"] > half["moved"] > by_name["diffsynth disk", 1.0, 2]["moved"] == 0
    assert nothing["misses"] == 0
    assert nothing["simulated"] > 0
    assert [row["of_resident"] for row in rows if row["contender"] == "resident"] == [1.0]


def test_diffusers_offload_runs_it_too(benchmark, options, monkeypatch):
    """Importing diffusers takes most of the time, where no other test has done so."""
    monkeypatch.setattr(benchmark.contenders, "GROUPS", (2,))
    (row,) = benchmark.run_one("z-image", "diffusers block_level", options)
    assert row["name"] == "diffusers block_level, groups of 2, disk"
    assert row["moved"] > 0
    assert row["memory"] is not None


def test_each_figure_is_from_the_right_rows(benchmark):
    def row(contender, seconds, memory, moved=0, **more):
        return {"contender": contender, "seconds": seconds, "memory": memory, "moved": moved, "digest": "a"} | more

    flow = [(1.0, 5), (3.0, 5)]
    rows = [
        row("resident", 4.0, 100),
        row("diffsynth cpu-offload", 5.0, 40, 10, bytes_per_second=2.0, flow=flow, slots=1, predicted=42),
        row("diffsynth cpu-offload", 6.0, 20, 20, bytes_per_second=4.0, flow=flow, slots=2),
        row("diffusers block_level", 9.0, 30, 20),
        row("diffusers leaf_level", 8.0, 10, 20, digest="b"),
        {"contender": "diffusers fp8", "network": "x", "failed": "exit code 1"},
    ]
    _, one, two, block, leaf, _ = benchmark.compare(rows)
    assert (one["hidden"], two["hidden"]) == (pytest.approx(1 - 1 / 5), pytest.approx(1 - 2 / 5))
    assert block["hidden"] == pytest.approx(1 - 5 * 2 / 20)
    assert one["simulated"] == pytest.approx(4 + 2 * 5 / 2)
    assert two["simulated"] == pytest.approx(1.25 + 3)
    assert one["memory_error"] == pytest.approx(0.05)
    assert block["ours_at_no_more_memory"] == pytest.approx(6 / 9)
    assert leaf["ours_at_no_more_memory"] is None
    assert not leaf["same_bits"]


@pytest.mark.parametrize(("digest", "code"), [("a", 0), ("b", 1)])
def test_other_bits_are_an_error(benchmark, monkeypatch, tmp_path, capsys, digest, code):
    def rows(name, contender, options):
        given = digest if contender == "diffsynth disk" else "a"
        same = {"network": name, "name": contender, "seconds": 1.0, "memory": 1, "moved": 0, "stays": 1.0}
        return [same | {"contender": contender, "digest": given, "peak_ram": 1}]

    monkeypatch.setattr(benchmark, "in_a_process", rows)
    monkeypatch.setattr(
        sys, "argv", ["vram.py", "--device", "cpu", "--networks", "wan", "--json", str(tmp_path / "x.json")]
    )
    assert benchmark.main() == code
    report = json.loads((tmp_path / "x.json").read_text())
    assert {"device", "versions", "page_cache"} <= set(report)
    assert len(report["rows"]) == len(benchmark.contenders.CONTENDERS)
    assert ("(other bits)" in capsys.readouterr().out) == bool(code)


def test_the_curve_without_a_device(benchmark):
    report = benchmark.curve.simulated("tiny", ("flux", "wan"))
    for rows in report["curves"].values():
        assert [row["share"] for row in rows] == list(benchmark.curve.SHARES)
        assert rows[0]["seconds_per_step"] >= rows[-1]["seconds_per_step"] > 0
        assert (rows[-1]["of_resident"], rows[-1]["moved"]) == (1.0, 0)
        assert all(0 <= row["hidden"] <= 1 for row in rows)
    assert [row["ours"] for row in report["beside_published"]][-1] == 1.0
    assert "cache-dit" in "\n".join(benchmark.curve.show(report))
