"""Torch pickles (`.pth`, `.pt`, `.bin`, `.ckpt`), read with `weights_only=True` and mapped, so tensors stay on disk."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffsynth.core.loader.explain import kinds
from diffsynth.core.loader.header import FileStamp, Header, TensorInfo
from diffsynth.errors import CorruptFile

_WRAPPERS = ("state_dict", "module", "model_state")
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
"""As safetensors spells them."""


def read(file: Path) -> Header:
    """The header of a pickle; a single `state_dict`, `module` or `model_state` around it is taken off.

    Raises:
        CorruptFile: not a pickle of tensors, or one that would run code.
    """
    with kinds.open_weights(file, pickled=True) as stream:
        stamp = FileStamp.of(stream.fileno())
    try:
        # Files of before torch 1.6 are no archives, which is what can be mapped: those are read whole.
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
    """The header of tensors that are in memory; nested dicts are flattened with dots.

    Raises:
        CorruptFile: two tensors come to have one name, or one has no strided memory.
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
    infos = {key: TensorInfo(DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in tensors.items()}
    nested = any(isinstance(value, Mapping) for value in state_dict.values())
    return Header(infos, {}, files, tensors, _shapes(state_dict) if nested else None, stamps or {})


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
