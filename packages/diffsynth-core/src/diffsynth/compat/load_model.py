"""A module class and a file make a module: loading without the registry, for networks of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffsynth.core import device as devices
from diffsynth.core.loader.key_differences import key_differences
from diffsynth.core.loader.reader.traced import called
from diffsynth.core.loader.state_dict import load_keys_dict, load_state_dict, placed
from diffsynth.errors import KeyMismatch, shortened

Module = TypeVar("Module", bound=nn.Module)
Path_ = str | Path | Sequence[str | Path]

_DISK_OFFLOAD_LIMIT = 80.0
"""GiB; what older code has there."""


def skip_model_initialization(device: torch.device | str = "meta") -> AbstractContextManager[Any]:
    """A context in which modules are built on `device`: on "meta" without memory or initialisation.

    It holds for the thread that entered it, and patches nothing.
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
    """`model_class(**config)` with the weights of a file, in eval mode.

    Args:
        model_class: of the module; it is built on the meta device first. Buffers that the file lacks are filled by its
            `reset_buffers()`.
        path: safetensors or pickle, or the files of one checkpoint; not read if there is a `state_dict`.
        config: keyword arguments of the class.
        torch_dtype: of floating tensors; None keeps the file's.
        device: where the module goes.
        state_dict_converter: makes the module's names of the file's; a function, or a class as older code has them,
            called without arguments first.
        use_disk_map: read only what the converter takes: it is run on tensors without values first. True for a file
            that holds several models.
        vram_config: eight keys, where its weights are while it does what; `device` and `torch_dtype` are those of
            computation if the keys do not say. With "disk" nothing is read before it is needed.
        module_map, vram_limit: with a `vram_config`; see `enable_vram_management`.
        state_dict: tensors in place of a file.
        quantize: not in this version.

    Raises:
        NotImplementedError: quantize, which this version does not have yet.
        KeyMismatch: the names or shapes do not fit the module; without a converter, before any tensor is read.
        CheckpointError: the file is missing or cannot be read.
        ValueError: neither a path nor a state_dict, a policy that cannot be kept, or a converter that would need values
            before they are read.
    """
    if quantize is not None:
        raise NotImplementedError(f"load_model(quantize={quantize!r}): it comes with quantization, in a later version")
    if vram_config is None and (module_map is not None or vram_limit is not None):
        raise ValueError("load_model got a module_map or a vram_limit without a vram_config; say where weights wait")
    source = _given(path) if state_dict is None else state_dict
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
    """`load_model` of weights that wait on disk and are rounded to float8_e4m3fn, as many on the device as it has room.

    Arguments and errors as there.
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
    """Give a module on meta its weights, from files or from a mapping."""
    where = "the given state_dict" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping) or (converter is not None and not ahead):
        found = source if isinstance(source, Mapping) else load_state_dict(source)
        tensors = dict(found if converter is None else called(converter, dict(found)))
        shapes = {key: getattr(tensor, "shape", tensor) for key, tensor in tensors.items()}
        _check(module, shapes, where=where)
        # Each is let go of as soon as it is placed.
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
    _fill_buffers(module)


def _managed(
    module: Module, source: Any, converter: Any, keys: Mapping[str, Any], module_map: Any, vram_limit: float | None
) -> Module:
    """A module on meta under a policy. It reads its weights itself, unless a converter has to see all of them."""
    from diffsynth.compat.vram import enable_vram_management
    from diffsynth.core.vram.disk_map import DiskMap

    disk_map = None
    if not isinstance(source, Mapping) and (converter is None or "disk" in keys.values()):
        disk_map = DiskMap(source, "cpu", keys["computation_dtype"], converter)
        _check(module, disk_map.source.shapes, where=str(source))
        _fill_buffers(module)
    else:
        _load(module, source, converter, dtype=keys["computation_dtype"], device="cpu")
    enable_vram_management(module.eval(), module_map, keys, vram_limit, disk_map)
    return module


def _given(path: Path_ | None) -> Path_:
    if path is None:
        raise ValueError("load_model got neither a path nor a state_dict")
    return path


def _check(module: nn.Module, found: Mapping[str, Any], *, where: str) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    shapes = {key: "a dict" if isinstance(shape, Mapping) else tuple(shape) for key, shape in found.items()}
    if differences := key_differences(shapes, wanted):
        raise KeyMismatch(
            f"{where} does not fit {type(module).__name__}: {differences.describe(limit=8)}. "
            f"Give a config that matches, or a state_dict_converter."
        )


def _fill_buffers(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "reset_buffers"):
            part.reset_buffers()
    in_files = module.state_dict().keys()
    left = [name for name, tensor in module.named_buffers() if tensor.is_meta and name not in in_files]
    if left:
        raise KeyMismatch(
            f"{type(module).__name__} has buffers that no file holds: {shortened(left)}. "
            f"Give it a reset_buffers() that fills them."
        )
