"""Total, free, used and pinned memory."""

import logging

import pytest
import torch

from diffsynth.core import device as devices
from diffsynth.core.device import memory
from fake_devices import BARE


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of /proc and of a cgroup to write."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_SELF", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:    512 kB\n")
    return tmp_path


def test_host_memory_is_limited_by_machine_and_container(system):
    assert (devices.available_memory("cpu"), devices.total_memory("cpu")) == (512 * 1024, 900 * 1024)
    (system / "memory.max").write_text("300000\n")
    (system / "memory.current").write_text("200000\n")
    (system / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert (devices.available_memory("cpu"), devices.total_memory("cpu")) == (150000, 300000)
    (system / "memory.max").write_text("max\n")
    assert (devices.available_memory("cpu"), devices.total_memory("cpu")) == (512 * 1024, 900 * 1024)
    (system / "meminfo").unlink()
    assert (devices.available_memory("cpu"), devices.total_memory("cpu")) == (None, None)


def test_memory_of_the_process(system):
    assert (devices.memory_in_use("cpu"), devices.peak_memory("cpu")) == (None, None)
    (system / "status").write_text("Name: x\nVmHWM:\t    7 kB\nVmRSS:\t    5 kB\n")
    assert (devices.memory_in_use("cpu"), devices.peak_memory("cpu")) == (5 * 1024, 7 * 1024)
    assert devices.reset_peak_memory("cpu")
    assert (system / "clear_refs").read_text() == "5"
    (system / "clear_refs").unlink()
    (system / "clear_refs").mkdir()
    assert not devices.reset_peak_memory("cpu")


def test_memory_of_a_device_with_memory_stats(recorded):
    assert devices.available_memory("cuda:1") == 1050  # free memory, and the allocator's reserve
    assert devices.total_memory("cuda:1") == 9000
    assert devices.memory_in_use("cuda:1") == 20
    assert devices.peak_memory("cuda:1") == 50
    assert devices.reset_peak_memory("cuda:1")
    devices.empty_cache("cuda:1")
    assert recorded.log == [("host", "resets the peak of cuda:1"), ("host", "empties the cache")]


def test_memory_of_a_device_without_memory_stats(bare):
    for ask in (devices.available_memory, devices.total_memory, devices.memory_in_use, devices.peak_memory):
        assert ask(BARE) is None
    assert not devices.reset_peak_memory(BARE)
    devices.empty_cache(BARE)


def test_memory_of_a_device_that_is_not_available(recorded):
    recorded.count = 0
    for ask in (devices.available_memory, devices.total_memory, devices.memory_in_use, devices.peak_memory):
        assert ask("cuda") is None
        assert ask("npu") is None
    assert not devices.reset_peak_memory("cuda")


def test_memory_of_metal(monkeypatch):
    class Metal:
        recommended_max_memory = staticmethod(lambda: 5)
        current_allocated_memory = staticmethod(lambda: 3)

    monkeypatch.setattr("diffsynth.core.device.backends.torch_module", {"mps": Metal}.get)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (devices.total_memory("mps"), devices.memory_in_use("mps")) == (5, 3)
    assert (devices.available_memory("mps"), devices.peak_memory("mps")) == (None, None)


def test_a_failure_to_pin_gives_pageable_memory_and_is_logged_once(recorded, monkeypatch, caplog):
    """A container that limits pinned memory refused the upload ring, and so the whole model."""
    monkeypatch.setattr(memory, "_warned", set())
    allocate = torch.empty

    def refusing(*size, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error:\n out of memory")
        return allocate(*size, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    with caplog.at_level(logging.WARNING):
        given = [devices.pinned_memory(16, "cuda:0") for _ in range(3)]
    assert [(tensor.numel(), tensor.dtype) for tensor in given] == [(16, torch.uint8)] * 3
    (record,) = caplog.records
    assert "16 bytes of host memory cannot be pinned for CUDA (CUDA error: out of memory)" in record.getMessage()


@pytest.mark.parametrize("device", ["cpu", BARE])
def test_a_device_without_pinned_memory_gets_pageable_memory_without_a_warning(bare, device, caplog):
    assert devices.pinned_memory(16, device).numel() == 16
    assert caplog.records == []
