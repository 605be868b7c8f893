"""`load_model`: loading a file into a module of the user's own class, without the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffsynth.core import device as devices
from diffsynth.core.loader.component import fill_buffers
from diffsynth.core.loader.key_differences import key_differences
from diffsynth.core.loader.reader.traced import called
from diffsynth.core.loader.state_dict import load_keys_dict, load_state_dict, placed
from diffsynth.errors import KeyMismatch

Module = TypeVar("Module", bound=nn.Module)
Path_ = str | Path | Sequence[str | Path]

_DISK_OFFLOAD_LIMIT = 80.0
"""GiB of device memory that `load_model_with_disk_offload` uses at most, as in DiffSynth-Studio."""


def skip_model_initialization(device: torch.device | str = "meta") -> AbstractContextManager[Any]:
    """Return a context manager inside which modules are built on `device`; on "meta" they take no memory and are not
    initialised.

    It is `torch.device(device)`, which applies to the current thread and patches nothing.
    """
    return torch.device(device)


def load_model(
    model_class: Callable[..., Module],
    path: Path_ | None,
    config: Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    state_dict_converter: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    use_disk_map: bool = False,
    module_map: Mapping[Any, Any] | None = None,
    vram_config: Mapping[str, Any] | None = None,
    vram_limit: float | None = None,
    state_dict: Mapping[str, Any] | None = None,
    quantize: Any = None,
) -> Module:
    """Return the module `model_class(**config)` in eval mode, with the weights of the file `path` or of `state_dict`,
    if that is given: on `device` in `torch_dtype`, or under the placement policy of `vram_config`, if that is given.

    Args:
        model_class: the module's class, which is built on the meta device first. Buffers that the file does not have
            are filled by the class's `reset_buffers()`.
        path: a safetensors file or a pickle, or the files of one checkpoint; ignored if there is a `state_dict`.
        config: keyword arguments of the class.
        torch_dtype: dtype of the floating tensors; None keeps the file's.
        device: the device of the module.
        state_dict_converter: a function from the file's tensors to the module's, or a class whose instances are such
            functions.
        use_disk_map: whether the converter is traced on tensors without values first, so that only the tensors it uses
            are read. For files that hold several models.
        module_map: with a `vram_config`; see `enable_vram_management`.
        vram_config: the eight placement keys. `device` and `torch_dtype` are the computation's unless the keys set
            them. With "disk" a tensor is read when it is needed.
        vram_limit: with a `vram_config`; see `enable_vram_management`.
        state_dict: tensors to use in place of a file.
        quantize: not available in this version.

    Raises:
        NotImplementedError: `quantize` is given.
        KeyMismatch: keys or shapes do not fit the module; without a converter, nothing was read.
        CheckpointError: the file is missing or cannot be read.
        ValueError: neither a path nor a state_dict, an invalid policy, or a converter that cannot be traced.
        TypeError: a `torch_dtype` that is no floating-point dtype.
    """
    if quantize is not None:
        raise NotImplementedError(f"load_model(quantize={quantize!r}): it comes with quantization, in a later version")
    if vram_config is None and (module_map is not None or vram_limit is not None):
        raise ValueError(
            "load_model got a module_map or a vram_limit without a vram_config; expected a vram_config, too"
        )
    if path is None and state_dict is None:
        raise ValueError("load_model got neither a path nor a state_dict")
    if torch_dtype is not None:
        devices.check_floating(torch_dtype, stored=vram_config is None)
    source = path if state_dict is None else state_dict
    with skip_model_initialization():
        module = model_class(**(config or {}))
    if vram_config is None:
        _load(module, source, state_dict_converter, dtype=torch_dtype, device=device, ahead=use_disk_map)
        return module.to(device).eval()
    computation = {"computation_device": device, "computation_dtype": torch_dtype}
    keys = computation | {name: value for name, value in vram_config.items() if value is not None}
    return _managed(module, source, state_dict_converter, keys, module_map, vram_limit)


def load_model_with_disk_offload(
    model_class: Callable[..., Module],
    path: Path_,
    config: Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    state_dict_converter: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    module_map: Mapping[Any, Any] | None = None,
) -> Module:
    """Return a `model_class(**config)` in eval mode whose weights stay on disk; as many blocks as fit stay on the
    device once loaded.

    Weights are rounded to float8_e4m3fn when they are read, and take at most 80 GiB of the device. Arguments and errors
    are those of `load_model`; a `path` is required.
    """
    device = torch.device(device)
    disk = {f"{state}_{part}": "disk" for state in ("offload", "onload") for part in ("device", "dtype")}
    ready = {"preparing_device": device, "preparing_dtype": torch.float8_e4m3fn}
    free = devices.available_memory(device)
    limit = None if free is None else min(free / 2**30, _DISK_OFFLOAD_LIMIT)
    return load_model(
        model_class,
        path,
        config,
        torch_dtype,
        device,
        state_dict_converter,
        module_map=module_map,
        vram_config=disk | ready,
        vram_limit=limit,
    )


def _load(
    module: nn.Module, source: Any, converter: Any, *, dtype: torch.dtype | None, device: Any, ahead: bool = False
) -> None:
    """Assign the weights of `source` (files, or a mapping key -> tensor) to `module`, which is on meta, and fill its
    buffers.
    """
    where = "the given state_dict" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping) or (converter is not None and not ahead):
        found = source if isinstance(source, Mapping) else load_state_dict(source)
        tensors = dict(found if converter is None else called(converter, dict(found)))
        shapes = {key: getattr(tensor, "shape", tensor) for key, tensor in tensors.items()}
        _check(module, shapes, where=where)
        # Each source tensor is freed as soon as its copy is on the device.
        weights = {key: placed(tensors.pop(key), dtype, device) for key in shapes}
    elif converter is None:
        _check(module, load_keys_dict(source), where=where)
        weights = load_state_dict(source, dtype, device)
    else:
        from diffsynth.core.vram.disk_map import DiskMap

        disk_map = DiskMap(source, device, dtype, converter)
        _check(module, disk_map.source.shapes, where=where)
        weights = disk_map.source.read(device=device)
    module.load_state_dict(weights, strict=True, assign=True)
    fill_buffers(module)


def _managed(
    module: Module, source: Any, converter: Any, keys: Mapping[str, Any], module_map: Any, vram_limit: float | None
) -> Module:
    """Put `module`, which is on meta, under the placement policy of `keys`, with the weights of `source`, and return
    it.

    The policy reads the weights from the file, unless a converter needs all of them in memory.
    """
    from diffsynth.compat.vram import enable_vram_management
    from diffsynth.core.vram.disk_map import DiskMap

    disk_map = None
    if not isinstance(source, Mapping) and (converter is None or "disk" in keys.values()):
        disk_map = DiskMap(source, "cpu", keys["computation_dtype"], converter)
        _check(module, disk_map.source.shapes, where=str(source))
        fill_buffers(module)
    else:
        _load(module, source, converter, dtype=keys["computation_dtype"], device="cpu")
    enable_vram_management(module.eval(), module_map, keys, vram_limit, disk_map)
    return module


def _check(module: nn.Module, found: Mapping[str, Any], *, where: str) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    shapes = {key: "a dict" if isinstance(shape, Mapping) else tuple(shape) for key, shape in found.items()}
    if differences := key_differences(shapes, wanted):
        raise KeyMismatch(
            f"{where} does not fit {type(module).__name__}: {differences.describe(limit=8)}. "
            f"Give a config that matches, or a state_dict_converter."
        )
