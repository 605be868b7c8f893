"""Device backends: CUDA (and ROCm, which torch calls CUDA), Ascend NPU, MPS and the CPU. No other package names one.

`backends` has the features of each backend. The other modules use them and have a fallback for a missing feature:
`names` (selection and checks), `streams`, `memory`, `random`, `speed` (measured once) and `upload` (a ring of buffers).
"""

from __future__ import annotations

from diffsynth.core.device.backends import ACCELERATORS, is_available
from diffsynth.core.device.memory import (
    available_memory,
    empty_cache,
    memory_in_use,
    peak_memory,
    pinned_memory,
    reset_peak_memory,
    total_memory,
)
from diffsynth.core.device.names import (
    built_for,
    card_name,
    check_device,
    check_dtype,
    check_floating,
    compute_capability,
    default_device,
    enable_high_precision_for_bf16,
    get_available_device_type,
    get_device_id,
    get_device_name,
    get_device_type,
    get_nccl_backend,
    get_torch_device,
    parse_device_type,
    parse_nccl_backend,
    present_devices,
)
from diffsynth.core.device.random import generator, random_state, set_random_state
from diffsynth.core.device.streams import (
    SideStream,
    Timestamp,
    record_event,
    side_stream,
    synchronize,
    timestamp,
    wait_event,
)

__all__ = [
    "ACCELERATORS",
    "IS_CUDA_AVAILABLE",
    "IS_NPU_AVAILABLE",
    "SideStream",
    "Timestamp",
    "available_memory",
    "built_for",
    "card_name",
    "check_device",
    "check_dtype",
    "check_floating",
    "compute_capability",
    "default_device",
    "empty_cache",
    "enable_high_precision_for_bf16",
    "generator",
    "get_available_device_type",
    "get_device_id",
    "get_device_name",
    "get_device_type",
    "get_nccl_backend",
    "get_torch_device",
    "memory_in_use",
    "parse_device_type",
    "parse_nccl_backend",
    "peak_memory",
    "pinned_memory",
    "present_devices",
    "random_state",
    "record_event",
    "reset_peak_memory",
    "set_random_state",
    "side_stream",
    "synchronize",
    "timestamp",
    "total_memory",
    "wait_event",
]

IS_CUDA_AVAILABLE: bool
"""Whether a CUDA or ROCm device can be used; looked up at each access."""

IS_NPU_AVAILABLE: bool
"""Whether an Ascend NPU can be used; looked up at each access."""


def __getattr__(name: str) -> bool:
    if name == "IS_CUDA_AVAILABLE":
        return is_available("cuda")
    if name == "IS_NPU_AVAILABLE":
        return is_available("npu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
