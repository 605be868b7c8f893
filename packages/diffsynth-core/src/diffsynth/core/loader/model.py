"""A module class and a file make a module: loading without the registry, for networks of your own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffsynth.core.loader.state_dict import load_keys_dict, load_state_dict, placed
from diffsynth.errors import KeyMismatch

Module = TypeVar("Module", bound=nn.Module)
Path_ = str | Path | Sequence[str | Path]

_SHOWN = 8
_LATER = {
    "use_disk_map": "the VRAM engine",
    "module_map": "the VRAM engine",
    "vram_config": "the VRAM engine",
    "vram_limit": "the VRAM engine",
    "quantize": "quantization",
}


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
        state_dict: tensors in place of a file.
        use_disk_map, module_map, vram_config, vram_limit, quantize: not in this version.

    Raises:
        NotImplementedError: an argument that this version does not have yet.
        KeyMismatch: the names or shapes do not fit the module; without a converter, before any tensor is read.
        CheckpointError: the file is missing or cannot be read.
        ValueError: neither a path nor a state_dict.
    """
    _refuse_later(
        use_disk_map=use_disk_map or None,
        module_map=module_map,
        vram_config=vram_config,
        vram_limit=vram_limit,
        quantize=quantize,
    )
    with skip_model_initialization():
        module = model_class(**(config or {}))
    if state_dict is None and state_dict_converter is None:
        _check(module, load_keys_dict(_given(path)), where=str(path))
        weights = load_state_dict(_given(path), torch_dtype, device)
    else:
        tensors = _converted(load_state_dict(_given(path)) if state_dict is None else state_dict, state_dict_converter)
        shapes = {key: getattr(tensor, "shape", tensor) for key, tensor in tensors.items()}
        _check(module, shapes, where="the given state_dict" if state_dict is not None else str(path))
        # Each is let go of as soon as it is placed.
        weights = {key: placed(tensors.pop(key), torch_dtype, device) for key in shapes}
    module.load_state_dict(weights, strict=True, assign=True)
    _fill_buffers(module)
    return module.to(device).eval()


def _given(path: Path_ | None) -> Path_:
    if path is None:
        raise ValueError("load_model got neither a path nor a state_dict")
    return path


def _converted(state_dict: Mapping[str, Any], converter: Any) -> dict[str, Any]:
    if inspect.isclass(converter):
        converter = converter()
    return dict(state_dict if converter is None else converter(dict(state_dict)))


def _refuse_later(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"load_model({name}={value!r}): this comes with {_LATER[name]}, which this version does not have yet. "
                f"Leave it out; from_pretrained(vram_limit=...) moves whole components of a pipeline."
            )


def _check(module: nn.Module, found: Mapping[str, Any], *, where: str) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    shapes = {key: "a dict" if isinstance(shape, Mapping) else tuple(shape) for key, shape in found.items()}
    problems = {
        "lacks": [key for key in wanted if key not in shapes],
        "has beyond that": [key for key in shapes if key not in wanted],
        "has in other shapes": [
            f"{key} {shapes[key]} for {wanted[key]}" for key in wanted if key in shapes and shapes[key] != wanted[key]
        ],
    }
    told = [
        f"{what} {', '.join(keys[:_SHOWN])}{f' and {len(keys) - _SHOWN} more' if len(keys) > _SHOWN else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if told:
        raise KeyMismatch(
            f"{where} does not fit {type(module).__name__}: it {'; it '.join(told)}. "
            f"Give a config that matches, or a state_dict_converter."
        )


def _fill_buffers(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "reset_buffers"):
            part.reset_buffers()
    left = [name for name, tensor in module.named_buffers() if tensor.is_meta]
    if left:
        raise KeyMismatch(
            f"{type(module).__name__} has buffers that no file holds: {', '.join(left[:_SHOWN])}. "
            f"Give it a reset_buffers() that fills them."
        )
