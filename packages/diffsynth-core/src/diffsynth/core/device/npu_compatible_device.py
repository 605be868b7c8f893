"""Door: functions that describe and control the device."""

from __future__ import annotations

from diffsynth.compat.doors import door

__getattr__ = door(
    __name__,
    {
        name: f"diffsynth.core.device:{name}"
        for name in (
            "IS_CUDA_AVAILABLE",
            "IS_NPU_AVAILABLE",
            "empty_cache",
            "enable_high_precision_for_bf16",
            "get_available_device_type",
            "get_device_id",
            "get_device_name",
            "get_device_type",
            "get_nccl_backend",
            "get_torch_device",
            "parse_device_type",
            "parse_nccl_backend",
            "synchronize",
        )
    },
)
