"""The Wan benchmark runs at a tiny size, with our library and with diffusers."""

import pytest

from benchmark_scripts import benchmark_script


@pytest.fixture(scope="module")
def benchmark():
    with benchmark_script("wan") as module:
        yield module


@pytest.mark.parametrize("library", ["diffsynth", "diffusers"])
@pytest.mark.parametrize("case", ["t2v-1.3b", "i2v-14b", "encode", "decode"])
def test_it_runs(benchmark, case, library):
    options = benchmark.arguments(["--tiny", "--repeats", "1", "--warmup", "0"])
    row = benchmark.run_one(case, library, options)
    assert row["seconds"] > 0
    assert ("frames_per_second" in row) == (case in ("encode", "decode"))


def test_both_do_the_same_work(benchmark):
    """Both libraries have the same number of parameters at the published sizes, counted on meta."""
    import torch

    meta = torch.device("meta")
    for case in benchmark.FULL.values():
        counts = []
        for library in benchmark.LIBRARIES:
            with meta:
                module = (
                    benchmark._autoencoder(library, 96)
                    if case.sizes is None
                    else benchmark._network(case.sizes, library)
                )
            counts.append(sum(parameter.numel() for parameter in module.parameters()))
        assert counts[0] == counts[1]


def test_published_figures_stand_beside_ours_at_full_size_alone(benchmark):
    rows = [
        {"case": "i2v-14b", "library": "diffsynth", "seconds": 5.0, "memory": 2**30},
        {"case": "decode", "library": "diffusers", "failed": "exit code 1"},
    ]
    text = "\n".join(benchmark.show(rows, tiny=False))
    assert "LightX2V" in text
    assert "failed: exit code 1" in text
    assert "LightX2V" not in "\n".join(benchmark.show(rows, tiny=True))
