"""Selection of a device, and early checks of devices and dtypes."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffsynth.core.device.backends import (
    ACCELERATORS,
    BACKENDS,
    CONVERTIBLE,
    backend_and_module,
    is_available,
    type_and_index,
)
from diffsynth.errors import did_you_mean, shown

_CPUINFO = Path("/proc/cpuinfo")


def default_device() -> torch.device:
    """Return the preferred available accelerator as a `torch.device`, or the CPU if there is none."""
    return torch.device(get_device_type())


def present_devices() -> tuple[str, ...]:
    """Return a tuple of the names of all devices here that torch can use, the CPU last: `("cuda:0", "cpu")`."""
    found: list[str] = []
    for kind, backend in BACKENDS.items():
        if is_available(kind):
            count = int(backend_and_module(kind)[1].device_count()) if backend.indexed else 1
            found += [f"{kind}:{index}" for index in range(count)] if backend.indexed else [kind]
    return tuple(found)


def check_device(device: torch.device | str | int) -> torch.device:
    """Raise ValueError unless this machine has a device; return it as a `torch.device`, with the current index if it
    has none ("cpu": none).

    Raises:
        ValueError: not a device, an unknown kind of device, or one that this machine does not have.
    """
    try:
        kind, index = type_and_index(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device {device!r}: expected a name such as 'cuda:0'; {_this_machine()}") from None
    if kind not in BACKENDS:
        near = did_you_mean(kind, BACKENDS)
        raise ValueError(
            f"device {str(device)!r}: diffsynth computes on {', '.join(BACKENDS)}; {_this_machine()}{near}"
        )
    backend, module = backend_and_module(kind)
    if not is_available(kind):
        raise ValueError(
            f"device {str(device)!r}: there is no {backend.label} device, which needs {backend.requirement}; "
            f"{_this_machine()}"
        )
    if index is None:
        index = int(module.current_device()) if backend.indexed else 0
    count = int(module.device_count()) if backend.indexed else 1
    if not 0 <= index < count:
        number = f"there {'are' if count > 1 else 'is'} {count} {backend.label} device{'s' if count > 1 else ''}"
        raise ValueError(f"device {str(device)!r}: {number}; {_this_machine()}")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, index)


def check_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Raise ValueError unless a device can convert tensors from and to `dtype`; return `dtype` unchanged.

    Computing in it is not checked. The answer comes from a table (`backends.py`), so the device need not be available.

    Raises:
        ValueError: the device has no conversion for it.
    """
    backend, _ = backend_and_module(device)
    supported = [one for one in CONVERTIBLE if one not in backend.unsupported_dtypes]
    if dtype not in supported:
        floats = ", ".join(str(one).removeprefix("torch.") for one in supported if one.is_floating_point)
        raise ValueError(f"{dtype} on {backend.label} has no conversion; its floating-point dtypes are {floats}")
    return dtype


def check_floating(dtype: torch.dtype, name: str = "torch_dtype", *, stored: bool = False) -> torch.dtype:
    """Raise TypeError unless `dtype` is a floating-point `torch.dtype` for weights and activations; return it
    unchanged.

    Args:
        dtype: as the caller gave it.
        name: of the argument, for the message.
        stored: whether weights are only stored in it, for which the float8 dtypes of `CONVERTIBLE` are accepted, too;
            computing takes 16 bits or more.

    Raises:
        TypeError: something else, such as a name or an integer dtype.
    """
    is_dtype = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype in CONVERTIBLE
    if not is_dtype or (dtype.itemsize < 2 and not stored) or dtype == torch.float8_e8m0fnu:  # powers of 2, for scales
        fewer = " or a float8 dtype" if stored else "; policy='fp8' stores weights in fewer bits"
        raise TypeError(f"{name}={shown(dtype)}: expected torch.bfloat16, torch.float16 or torch.float32{fewer}")
    return dtype


def card_name(device: torch.device | str) -> str:
    """Return the name of a device's hardware, such as "NVIDIA H100 80GB HBM3"; for the CPU and MPS that of the
    processor.
    """
    backend, module = backend_and_module(device)
    if backend.indexed and module is not None:
        return str(module.get_device_name(torch.device(device)))
    return _processor()


def compute_capability(device: torch.device | str) -> tuple[int, int] | None:
    """Return a device's CUDA compute capability as a tuple (major, minor), (9, 0) for Hopper; None unless it is a CUDA
    device.

    That is the case for ROCm, every other kind of device, and a machine without CUDA devices.
    """
    backend, module = backend_and_module(device)
    if backend.kind != "cuda" or torch.version.hip is not None or not is_available(backend.kind):
        return None
    major, minor = module.get_device_capability(torch.device(device))
    return int(major), int(minor)


def built_for() -> tuple[str, ...]:
    """Return a tuple of the toolkits that torch is built for, `("CUDA 13.2",)` or `("ROCm 7.0",)`; empty for any other
    build.
    """
    kits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return tuple(f"{kit} {version}" for kit, version in kits.items() if version)


def get_device_type() -> str:
    """Return the type of the default device (an accelerator if there is one) as text: "cuda", "npu", "mps" or "cpu"."""
    return next((kind for kind in ACCELERATORS if is_available(kind)), "cpu")


get_available_device_type = get_device_type


def get_device_name() -> str:
    """Return the name of the default device with its current index, such as "cuda:0"; "cpu" and "mps" have no index."""
    kind = get_device_type()
    return f"{kind}:{get_device_id()}" if BACKENDS[kind].indexed else kind


def get_device_id() -> int:
    """Return the index (an int) of the current device of the default type; 0 for "cpu" and "mps"."""
    kind = get_device_type()
    return int(backend_and_module(kind)[1].current_device()) if BACKENDS[kind].indexed else 0


def get_torch_device() -> Any:
    """Return torch's Python module for the default device: `torch.cuda`, `torch.npu`, `torch.mps` or `torch.cpu`."""
    return getattr(torch, get_device_type())


def parse_device_type(device: torch.device | str) -> str:
    """Return the type, as text, of a device or of a device's name: `"cuda"` for `"cuda:1"`."""
    return type_and_index(device)[0]


def parse_nccl_backend(device_type: str) -> str:
    """Return the name of torch.distributed's backend for a device type: "nccl" for "cuda", "hccl" for "npu", else
    "gloo".

    Raises:
        ValueError: an unknown type.
    """
    if device_type not in BACKENDS:
        raise ValueError(f"device type {device_type!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[device_type].collectives


def get_nccl_backend() -> str:
    """Return the name of torch.distributed's backend for the default device: "nccl" on CUDA, "hccl" on NPU, else
    "gloo".
    """
    return parse_nccl_backend(get_device_type())


def enable_high_precision_for_bf16() -> None:
    """Disable TF32 (CUDA) or HF32 (NPU) in this process's matrix products on the default device; do nothing on MPS and
    the CPU.

    On CUDA this also disables reduced-precision sums of bf16 products.
    """
    kind = get_device_type()
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif kind == "npu":
        # The equivalent of TF32 on Ascend.
        backend_and_module(kind)[1].matmul.allow_hf32 = False


def _this_machine() -> str:
    return f"this machine has {', '.join(present_devices())}"


@cache
def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
