"""Choosing a device, and telling early that one, or a dtype on it, is not to be had."""

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
    driven,
    is_available,
    parts,
)
from diffsynth.errors import did_you_mean

_CPUINFO = Path("/proc/cpuinfo")


def default_device() -> torch.device:
    """The first accelerator that is there, else the CPU."""
    return torch.device(get_device_type())


def present_devices() -> tuple[str, ...]:
    """Every device of this machine that torch can use, the CPU last: `("cuda:0", "cuda:1", "cpu")`."""
    found: list[str] = []
    for kind, backend in BACKENDS.items():
        if is_available(kind):
            count = int(driven(kind)[1].device_count()) if backend.indexed else 1
            found += [f"{kind}:{index}" for index in range(count)] if backend.indexed else [kind]
    return tuple(found)


def check_device(device: torch.device | str | int) -> torch.device:
    """The device as its tensors name it, "cuda:0" for "cuda", if it is there.

    Raises:
        ValueError: not a device, one of a kind that diffsynth does not know, or one that is not on this machine.
    """
    try:
        kind, index = parts(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device {device!r}: expected a name such as 'cuda:0'; {_these()}") from None
    if kind not in BACKENDS:
        near = did_you_mean(kind, BACKENDS)
        raise ValueError(f"device {str(device)!r}: diffsynth computes on {', '.join(BACKENDS)}; {_these()}{near}")
    backend, module = driven(kind)
    if not is_available(kind):
        raise ValueError(
            f"device {str(device)!r}: there is no {backend.label} device, which needs {backend.needs}; {_these()}"
        )
    if index is None:
        index = int(module.current_device()) if backend.indexed else 0
    count = int(module.device_count()) if backend.indexed else 1
    if not 0 <= index < count:
        number = f"there {'are' if count > 1 else 'is'} {count} {backend.label} device{'s' if count > 1 else ''}"
        raise ValueError(f"device {str(device)!r}: {number}; {_these()}")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, index)


def check_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype, if the device converts from and to it. It need not compute in it.

    Answered from a table (`backends.py`), so that it can be asked for a device that is not here.

    Raises:
        ValueError: the device cannot.
    """
    backend, _ = driven(device)
    can = [one for one in CONVERTIBLE if one not in backend.lacks]
    if dtype not in can:
        floats = ", ".join(str(one).removeprefix("torch.") for one in can if one.is_floating_point)
        raise ValueError(f"{dtype} on {backend.label}: nothing converts to or from it there; its floats are {floats}")
    return dtype


def card_name(device: torch.device | str) -> str:
    """What the hardware calls itself, "NVIDIA H100 80GB HBM3"; the processor's name for the CPU and MPS."""
    backend, module = driven(device)
    if backend.indexed and module is not None:
        return str(module.get_device_name(torch.device(device)))
    return _processor()


def compute_capability(device: torch.device | str) -> tuple[int, int] | None:
    """The generation of a CUDA device, (9, 0) for Hopper; None for every other kind and for ROCm, which counts anew."""
    backend, module = driven(device)
    if backend.kind != "cuda" or torch.version.hip is not None or not is_available(backend.kind):
        return None
    major, minor = module.get_device_capability(torch.device(device))
    return int(major), int(minor)


def built_for() -> tuple[str, ...]:
    """What this torch is compiled for besides the CPU: `("CUDA 13.2",)`. Packages such as torch_npu do not tell."""
    kits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return tuple(f"{kit} {version}" for kit, version in kits.items() if version)


def get_device_type() -> str:
    """ "cuda", "npu", "mps" or "cpu": the type of `default_device()`."""
    return next((kind for kind in ACCELERATORS if is_available(kind)), "cpu")


get_available_device_type = get_device_type


def get_device_name() -> str:
    """The default device with its index, "cuda:0"; "cpu" and "mps" have none."""
    kind = get_device_type()
    return f"{kind}:{get_device_id()}" if BACKENDS[kind].indexed else kind


def get_device_id() -> int:
    """Index of the current device of the default kind; 0 where there is only one."""
    kind = get_device_type()
    return int(driven(kind)[1].current_device()) if BACKENDS[kind].indexed else 0


def get_torch_device() -> Any:
    """torch's module for the default device: `torch.cuda`, `torch.npu`, `torch.mps` or `torch.cpu`."""
    return getattr(torch, get_device_type())


def parse_device_type(device: torch.device | str) -> str:
    """The type in a device or its name, `"cuda"` of `"cuda:1"`."""
    return parts(device)[0]


def parse_nccl_backend(device_type: str) -> str:
    """The collectives that torch.distributed uses on a device type: "nccl", "hccl" or "gloo".

    Raises:
        ValueError: an unknown type.
    """
    if device_type not in BACKENDS:
        raise ValueError(f"device type {device_type!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[device_type].collectives


def get_nccl_backend() -> str:
    """The collectives of the default device."""
    return parse_nccl_backend(get_device_type())


def enable_high_precision_for_bf16() -> None:
    """Turn TF32 and reduced-precision bf16 sums of matrix products off, process-wide. Nothing on MPS and the CPU."""
    kind = get_device_type()
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif kind == "npu":
        # Ascend's counterpart of TF32.
        driven(kind)[1].matmul.allow_hf32 = False


def _these() -> str:
    return f"this machine has {', '.join(present_devices())}"


@cache
def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
