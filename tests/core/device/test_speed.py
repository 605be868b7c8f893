"""Speeds are measured once and cached; an assumption is marked as such where they cannot be measured."""

import json
import os

import pytest
import torch

from diffsynth.core.device import speed
from diffsynth.core.device.speed import compute_speed, disk_speed, link_speed


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_CACHE_DIR", str(tmp_path / "cache"))
    for name, size in (("_LINK_BYTES", 2**20), ("_DISK_BYTES", 2**20), ("_DISK_BLOCK", 2**16), ("_LAST_WIDTH", 512)):
        monkeypatch.setattr(speed, name, size)


def every(folder):
    computing = [compute_speed("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    return [link_speed("cpu"), *computing, disk_speed(folder)]


def refuse(*_):
    raise AssertionError("measured a second time")


def test_measured_once_and_cached(monkeypatch, tmp_path):
    first = every(tmp_path)
    assert all(one.measured and one.value > 0 for one in first)
    kept = json.loads((tmp_path / "cache" / "speed.json").read_text())
    assert sorted(kept.values()) == sorted(one.value for one in first)
    assert all(f"torch {torch.__version__}" in key for key in kept if not key.startswith("disk"))
    for name in ("_measure_link", "_measure_compute", "_measure_disk"):
        monkeypatch.setattr(speed, name, refuse)
    assert every(tmp_path) == first


def test_the_disk_under_a_folder_that_is_not_there_yet(tmp_path):
    assert disk_speed(tmp_path / "models" / "later").measured
    assert os.listdir(tmp_path) == ["cache"]  # the temporary file is removed


def test_the_rates(monkeypatch):
    """Every measurement takes half a second; a product is 2 n**3 operations."""
    monkeypatch.setattr(speed, "_timed", lambda run, device: 0.5)
    assert compute_speed("cpu", torch.float32).value == 2 * 256**3 / 0.5
    assert link_speed("cpu").value == 2**20 / 0.5


def test_products_grow_until_they_take_long_enough(monkeypatch):
    monkeypatch.setattr(speed, "_product_seconds", lambda width, device, dtype: (width / 1024) ** 3)
    monkeypatch.setattr(speed, "_LAST_WIDTH", 8192)
    monkeypatch.setattr(speed, "_LONG_ENOUGH", 0.9)
    assert compute_speed("cpu", torch.float32).value == 2 * 1024**3


@pytest.mark.parametrize("device", ["cuda:1", "npu", "mps"])
def test_assumed_for_a_device_that_is_not_available(monkeypatch, device):
    monkeypatch.setattr(speed, "is_available", lambda kind: kind == "cpu")
    for one in (link_speed(device), compute_speed(device, torch.bfloat16), compute_speed(device, torch.float32)):
        assert not one.measured
        assert one.source.startswith("assumed: ")
        assert one.value > 1e9
    assert link_speed("cuda").value == 25e9


def test_assumed_and_not_cached_if_measuring_fails(monkeypatch, tmp_path):
    def full(*_):
        raise RuntimeError("CUDA out of memory.\n Tried to allocate")

    monkeypatch.setattr(speed, "_measure_link", full)
    one = link_speed("cpu")
    assert not one.measured
    assert one.source.endswith("; not measured: CUDA out of memory. Tried to allocate")
    monkeypatch.undo()
    monkeypatch.setenv("DIFFSYNTH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "_LINK_BYTES", 2**20)
    assert link_speed("cpu").measured


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(speed.tempfile, "TemporaryFile", denied)
    one = disk_speed(tmp_path)
    assert (one.measured, one.value) == (False, 3e9)
    assert "not measured: [Errno 13] Permission denied" in one.source


@pytest.mark.parametrize("content", ["{", "[]", '{"link": "fast"}'])
def test_a_broken_cache_costs_a_measurement(tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "speed.json").write_text(content)
    assert link_speed("cpu").measured
    assert len(json.loads((tmp_path / "cache" / "speed.json").read_text())) == (2 if "fast" in content else 1)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFSYNTH_CACHE_DIR", str(tmp_path / "file"))
    assert link_speed("cpu").measured


def test_bad_input():
    with pytest.raises(ValueError, match="device type 'tpu': expected one of cuda, npu, mps, cpu"):
        link_speed("tpu")
    with pytest.raises(ValueError, match="matrix products are measured in bfloat16, float16, float32"):
        compute_speed("cpu", torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="there is 1 CPU device"):
        link_speed("cpu:1")
