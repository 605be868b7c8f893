"""Headers of torch pickles (`.pth`, `.pt`, `.bin`, `.ckpt`) and of state dicts in memory.

A pickle is loaded with `weights_only=True`, so that it cannot run code, and mapped, so that its tensors stay on disk.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffsynth.core.loader import file_kinds, quantization_notes
from diffsynth.core.loader.dtypes import dtype_names
from diffsynth.core.loader.header import FileStamp, Header, TensorInfo
from diffsynth.errors import CorruptFile

_WRAPPERS = ("state_dict", "module", "model_state")


def read(file: Path) -> Header:
    """Return the `Header` of a torch pickle: dtype and shape of each tensor, and the tensors themselves.

    A single `state_dict`, `module` or `model_state` around the tensors is removed.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: the file is not a pickle of tensors, or it would run code.
    """
    with file_kinds.open_weights(file, pickled=True) as stream:
        stamp = FileStamp.of(stream.fileno())
    try:
        # Files written before torch 1.6 are no archives and cannot be mapped: they are read whole.
        mapped = zipfile.is_zipfile(file)
        loaded = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # damaged bytes end anywhere in the unpickler: KeyError, IndexError, struct.error, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptFile(f"{file} is not a torch checkpoint of tensors alone: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise CorruptFile(f"{file} holds a {type(loaded).__name__}; expected a dict of tensors")
    return of_state_dict(loaded, (file,), {file: stamp})


def of_state_dict(
    state_dict: Mapping[str, Any], files: tuple[Path, ...] = (), stamps: Mapping[Path, FileStamp] | None = None
) -> Header:
    """Return the `Header` of a state dict: dtype and shape of each tensor, and the tensors; nested keys are joined by
    dots, a sole outer key such as "state_dict" is left out.

    Args:
        state_dict: tensors by key; values that are neither tensors nor dicts are ignored.
        files: the files that the tensors come from.
        stamps: their stamps.

    Raises:
        CorruptFile: two tensors get the same name, or one is not strided.
    """
    while len(state_dict) == 1 and next(iter(state_dict)) in _WRAPPERS:
        if not isinstance(next(iter(state_dict.values())), Mapping):
            break
        state_dict = next(iter(state_dict.values()))
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in _flatten(state_dict):
        if key in tensors:
            raise CorruptFile(f"two tensors are called {key!r} once nested names are joined by dots")
        if tensor.layout is not torch.strided:
            raise CorruptFile(f"{key!r} is a {tensor.layout} tensor; expected a dense one")
        tensors[key] = tensor
    infos = {key: TensorInfo(dtype_names().get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in tensors.items()}
    nested = any(isinstance(value, Mapping) for value in state_dict.values())
    suffix = f".{quantization_notes.NOTE}"
    notes = {
        key.removesuffix(suffix): quantization_notes.of_bytes(key, bytes(tensor.flatten().tolist()))
        for key, tensor in tensors.items()
        if key.endswith(suffix) and tensor.dtype == torch.uint8
    }
    shapes = _shapes(state_dict) if nested else None
    return Header(infos, {}, files, tensors, shapes, stamps or {}, notes)


def _flatten(nested: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in nested.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")


def _shapes(nested: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _shapes(value) if isinstance(value, Mapping) else tuple(value.shape)
        for key, value in nested.items()
        if isinstance(value, Mapping | torch.Tensor)
    }
