"""Door: the wrapper classes and functions of DiffSynth-Studio's memory management."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(
    __name__,
    {
        name: f"diffsynth.compat.vram:{name}"
        for name in (
            "AutoTorchModule",
            "AutoWrappedLinear",
            "AutoWrappedModule",
            "AutoWrappedNonRecurseModule",
            "enable_vram_management",
            "enable_vram_management_recursively",
            "fill_vram_config",
        )
    },
    {"AutoWrappedQuantizedModule": later("more of quantization")},
)
