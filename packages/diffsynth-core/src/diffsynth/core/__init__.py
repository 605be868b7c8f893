"""Parts that another codebase can use on their own: nothing here depends on the registry or on pipelines.

The public names are imported on first use: `import diffsynth.core` alone does not import torch.
"""

from __future__ import annotations

from diffsynth.compat.doors import QUANTIZATION, door, later

_MODULES = {
    "attention.forward": ("attention_forward",),
    "compat.attention": (
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
        "sage_attention",
        "torch_sdpa_sliding_window",
        "xformers_attention",
    ),
    "data.operators": (
        "DataProcessingOperator",
        "DataProcessingOperatorRaw",
        "DataProcessingPipeline",
        "FrameSamplerByRateMixin",
        "ImageCropAndResize",
        "LoadAudio",
        "LoadAudioWithTorchaudio",
        "LoadGIF",
        "LoadImage",
        "LoadPureAudioWithTorchaudio",
        "LoadTorchPickle",
        "LoadVideo",
        "RouteByExtensionName",
        "RouteByType",
        "SequencialProcess",
        "SequentialProcess",
        "ToAbsolutePath",
        "ToFloat",
        "ToInt",
        "ToList",
        "ToStr",
    ),
    "data.unified_dataset": ("UnifiedDataset",),
    "device": (
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
    ),
    "gradient.checkpoint": ("gradient_checkpoint_forward",),
    "loader.config": ("ModelConfig",),
    "compat.load_model": ("load_model", "load_model_with_disk_offload", "skip_model_initialization"),
    "loader.state_dict": (
        "hash_model_file",
        "hash_state_dict_keys",
        "load_keys_dict",
        "load_metadata_from_safetensors",
        "load_state_dict",
        "load_state_dict_from_bin",
        "load_state_dict_from_safetensors",
    ),
    "lora.hot": ("LoRAHotLoadMixin",),
    "quant.config": ("MixedQuantizeConfig", "QuantizeConfig"),
    "vram.disk_map": ("DiskMap",),
    "compat.vram": (
        "AutoTorchModule",
        "AutoWrappedLinear",
        "AutoWrappedModule",
        "AutoWrappedNonRecurseModule",
        "enable_vram_management",
        "enable_vram_management_recursively",
        "fill_vram_config",
    ),
}
_FOUND = {
    name: f"diffsynth.{module}:{name}" if module.startswith("compat.") else f"diffsynth.core.{module}:{name}"
    for module, names in _MODULES.items()
    for name in names
}
_ABSENT = {
    **dict.fromkeys(QUANTIZATION, later("more of quantization")),
    "OffloadTrainingManager": later("offloaded training"),
}

__all__ = sorted(_FOUND)
__getattr__ = door(__name__, _FOUND, _ABSENT)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
