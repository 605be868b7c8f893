import pytest
import torch

from diffsynth.core import device as devices


def test_the_first_accelerator_wins(monkeypatch):
    monkeypatch.setattr("diffsynth.core.device.names.is_available", lambda kind: kind in ("npu", "mps"))
    assert devices.get_device_type() == "npu"
    monkeypatch.setattr("diffsynth.core.device.names.is_available", lambda kind: False)
    assert devices.default_device() == torch.device("cpu")
    assert (devices.get_device_name(), devices.get_device_id()) == ("cpu", 0)
    assert (devices.IS_CUDA_AVAILABLE, devices.IS_NPU_AVAILABLE) == (False, False)


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
