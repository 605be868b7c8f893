"""Device and dtype checks: a device or dtype that is not available is refused by name, before anything is loaded."""

import pytest
import torch

from diffsynth.core import device as devices
from diffsynth.core.device import backends
from fake_devices import BARE


def test_a_device_as_its_tensors_name_it(recorded):
    assert devices.check_device("cuda") == torch.device("cuda", 0)
    assert devices.check_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert devices.check_device("cpu") == devices.check_device("cpu:0") == torch.zeros(0).device
    assert devices.present_devices() == ("cuda:0", "cuda:1", "cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:3", "device 'cuda:3': there are 2 CUDA devices; this machine has cuda:0, cuda:1, cpu"),
        ("npu", "device 'npu': there is no Ascend NPU device, which needs torch_npu and CANN; this machine has"),
        (
            "CUDA:1",
            "device 'CUDA:1': diffsynth computes on .*; this machine has cuda:0, cuda:1, cpu; did you mean 'cuda'",
        ),
        ("meta", "device 'meta': diffsynth computes on cuda, npu, mps, cpu"),
        ("cuda:one", "device 'cuda:one': expected a name such as 'cuda:0'; this machine has cuda:0, cuda:1, cpu"),
        ("cpu:3", "device 'cpu:3': there is 1 CPU device; this machine"),
        ("cuda:256", "device 'cuda:256': there are 2 CUDA devices"),
        ("cuda:-1", "device 'cuda:-1': expected a name such as 'cuda:0'"),
        ("", "device '': diffsynth computes on"),
        (None, "device None: expected a name such as 'cuda:0'"),
        (1.5, "device 1.5: expected a name"),
    ],
)
def test_a_device_that_is_not_there(recorded, device, message):
    with pytest.raises(ValueError, match=message):
        devices.check_device(device)


def test_one_device_and_none(recorded):
    recorded.count = 1
    with pytest.raises(ValueError, match="'cuda:3': there is 1 CUDA device; this machine has cuda:0, cpu"):
        devices.check_device("cuda:3")
    recorded.count = 0
    with pytest.raises(ValueError, match="no CUDA device, which needs a torch built for CUDA or ROCm, and the driver"):
        devices.check_device("cuda:3")


def test_a_backend_that_is_added(bare):
    assert devices.check_device(BARE) == torch.device(BARE, 0)
    assert devices.present_devices() == ("cpu", BARE)
    assert devices.parse_nccl_backend(BARE) == "gloo"
    assert devices.check_dtype(torch.bfloat16, BARE) == torch.bfloat16
    with pytest.raises(ValueError, match="float8_e4m3fn on Toy .*dtypes are float32, bfloat16, float16, "):
        devices.check_dtype(torch.float8_e4m3fn, BARE)


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.float64, "mps"),
        (torch.complex128, "mps"),
        (torch.float8_e4m3fn, "mps"),
        (torch.float8_e5m2, "npu:0"),
        (torch.float4_e2m1fn_x2, "cuda"),
        (torch.int4, "cpu"),
    ],
)
def test_a_dtype_that_a_device_lacks(dtype, device):
    """The devices are not available, and this torch cannot parse "npu"."""
    with pytest.raises(ValueError, match=f"{dtype} on .* has no conversion; its floating-point dtypes are "):
        devices.check_dtype(dtype, device)


def test_dtypes_that_every_device_has():
    for kind in backends.BACKENDS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
            assert devices.check_dtype(dtype, kind) is dtype


def test_the_hardware_by_name(recorded, tmp_path, monkeypatch):
    assert devices.card_name("cuda:1") == "Fake cuda:1"
    assert devices.compute_capability("cuda:1") == (9, 0)
    assert devices.compute_capability("cpu") is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert devices.compute_capability("cuda:1") is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices.built_for() == ("ROCm 7.0",)
    assert devices.card_name("cpu") != ""


def test_the_first_accelerator_wins(monkeypatch):
    monkeypatch.setattr("diffsynth.core.device.names.is_available", lambda kind: kind in ("npu", "mps"))
    assert devices.get_device_type() == "npu"
    monkeypatch.setattr("diffsynth.core.device.names.is_available", lambda kind: False)
    assert devices.default_device() == torch.device("cpu")
    assert (devices.get_device_name(), devices.get_device_id()) == ("cpu", 0)
    assert (devices.IS_CUDA_AVAILABLE, devices.IS_NPU_AVAILABLE) == (False, False)


def test_names_of_the_reference():
    assert devices.parse_device_type("cuda:3") == devices.parse_device_type(torch.device("cuda", 0)) == "cuda"
    assert devices.parse_nccl_backend("npu") == "hccl"
    with pytest.raises(ValueError, match="expected one of cuda, npu, mps, cpu"):
        devices.parse_nccl_backend("tpu")
    missing = [name for name in devices.__all__ if not hasattr(devices, name)]
    assert missing == []
    with pytest.raises(AttributeError, match="no attribute 'IS_TPU_AVAILABLE'"):
        _ = devices.IS_TPU_AVAILABLE


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn, None, float])
def test_dtypes_of_activations(dtype):
    assert devices.check_floating(torch.float16) == torch.float16
    with pytest.raises(TypeError, match=r"torch_dtype=.*: expected torch\.bfloat16"):
        devices.check_floating(dtype)
