import pytest
import torch

from diffsynth.core import device as devices
from diffsynth.core.device import backends, memory


def test_the_first_accelerator_wins(monkeypatch):
    monkeypatch.setattr("diffsynth.core.device.names.is_available", lambda kind: kind in ("npu", "mps"))
    assert devices.get_device_type() == "npu"
    monkeypatch.setattr("diffsynth.core.device.names.is_available", lambda kind: False)
    assert devices.default_device() == torch.device("cpu")
    assert (devices.get_device_name(), devices.get_device_id()) == ("cpu", 0)
    assert (devices.IS_CUDA_AVAILABLE, devices.IS_NPU_AVAILABLE) == (False, False)


def test_free_host_memory_is_what_both_machine_and_container_allow(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:    512 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert devices.available_memory("cpu") == 512 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("200000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert devices.available_memory("cpu") == 150000
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.available_memory("cpu") == 512 * 1024
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nothing")
    assert devices.available_memory("cpu") is None


def test_free_accelerator_memory_counts_the_reserve(monkeypatch):
    class Backend:
        mem_get_info = staticmethod(lambda device: (1000, 9000))
        memory_reserved = staticmethod(lambda device: 70)
        memory_allocated = staticmethod(lambda device: 20)

    monkeypatch.setattr(backends, "torch_module", lambda kind: Backend)
    assert devices.available_memory("cuda:1") == 1050
    assert devices.available_memory("mps") is None


def test_a_seed_gives_the_same_numbers():
    first, second = (torch.randn(3, generator=devices.generator("cpu", seed=5)) for _ in range(2))
    assert torch.equal(first, second)
    assert devices.generator("mps", seed=1).device.type == "cpu"


def test_the_cpu_has_nothing_to_wait_for():
    assert devices.synchronize("cpu") is None
    assert devices.empty_cache("cpu") is None


def test_names_of_the_reference():
    assert devices.parse_device_type("cuda:3") == devices.parse_device_type(torch.device("cuda", 0)) == "cuda"
    assert devices.parse_nccl_backend("npu") == "hccl"
    with pytest.raises(ValueError, match="expected one of cuda, npu, mps, cpu"):
        devices.parse_nccl_backend("tpu")
    missing = [name for name in devices.__all__ if not hasattr(devices, name)]
    assert missing == []
    with pytest.raises(AttributeError, match="no attribute 'IS_TPU_AVAILABLE'"):
        _ = devices.IS_TPU_AVAILABLE
