"""Headers of torch pickles (`.pth`, `.pt`, `.bin`, `.ckpt`) and of state dicts in memory.

A pickle is loaded with `weights_only=True`, so that it cannot run code, and mapped, so that its tensors stay on disk.
Objects of the usual settings classes, which trainers save beside the weights, are left out; none of them is imported.
"""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffsynth.core.loader import file_kinds, quantization_notes
from diffsynth.core.loader.dtypes import dtype_names
from diffsynth.core.loader.header import FileStamp, Header, TensorInfo, check_count
from diffsynth.errors import CorruptFile, shown

_WRAPPERS = ("state_dict", "module", "model_state")
"""Keys of a sole dict that is left out; published hashes of nested files are of what is in it."""

_NOT_WEIGHTS = re.compile(r"(?i)(.*_)?(optim(izer)?s?|lr_?schedulers?|schedulers?|scaler|loops|callbacks)(_.*)?")
"""Names of dicts in a trainer's pickle that hold tensors which are no weights."""

_SETTINGS = (
    *("argparse", "datetime", "easydict", "enum", "ml_collections", "omegaconf", "pathlib", "typing", "yacs"),
    *("numpy", "accelerate", "diffusers", "lightning", "lightning_fabric", "peft", "pytorch_lightning", "transformers"),
    *("torch.optim", "torch.torch_version", "types.SimpleNamespace", "__main__"),
)
"""Modules and classes whose objects are settings or numbers of a training run, not tensors."""

_MOST_CLASSES = 64
"""Largest number of different classes of `_SETTINGS` in one file."""

_loading = threading.Lock()
"""Held while torch's list of accepted classes is changed, which all threads share."""

_DEPTH = 32
"""Largest number of dicts in dicts."""

_EXPANDED = 2**20
"""Bytes that a tensor may have more than its storage."""


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
        if mapped:
            _check_archive(file, stamp.size)
        loaded = _loaded(file, mapped)
    except CorruptFile:
        raise
    except Exception as error:  # damaged bytes end anywhere in the unpickler: KeyError, IndexError, struct.error, ...
        raise CorruptFile(f"{file} is not a torch checkpoint of tensors alone: {_reason(error)}") from None
    if not isinstance(loaded, Mapping):
        raise CorruptFile(f"{file} holds a {type(loaded).__name__}; expected a dict of tensors")
    return of_state_dict(loaded, (file,), {file: stamp})


class _LeftOut:
    """Object that takes the place of one of a settings class in a pickle; it keeps nothing of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _LeftOut:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _loaded(file: Path, mapped: bool) -> Any:
    """Return what `torch.load` reads, without objects of settings classes; its errors are those of `torch.load`."""
    classes: list[str] = []
    while True:
        try:
            if not classes:
                return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
            with _loading, torch.serialization.safe_globals([(_LeftOut, name) for name in classes]):
                return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
        except Exception as error:
            name = _unknown_class(error)
            if not _is_setting(name) or name in classes or len(classes) >= _MOST_CLASSES:
                raise
            classes.append(name)


def _unknown_class(error: Exception) -> str:
    """Return the full name of the class or function that torch's unpickler does not accept; "" for another error."""
    found = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
    return found[1] if found else ""


def _is_setting(name: str) -> bool:
    return any(name == known or name.startswith(f"{known}.") for known in _SETTINGS)


def _reason(error: Exception) -> str:
    """Return why torch cannot read a file, as one line without its advice to allow code."""
    if name := _unknown_class(error):
        return (
            f"it holds an object of {name}, which could run code. Save the tensors alone, torch.save(net.state_dict(), "
            f"...), or as safetensors"
        )
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def of_state_dict(
    state_dict: Mapping[str, Any], files: tuple[Path, ...] = (), stamps: Mapping[Path, FileStamp] | None = None
) -> Header:
    """Return the `Header` of a state dict: dtype and shape of each tensor, and the tensors; nested keys are joined by
    dots, a sole outer key such as "state_dict" is left out.

    Args:
        state_dict: tensors by key; values that are neither tensors nor dicts are ignored, but for the alphas of LoRAs.
        files: the files that the tensors come from.
        stamps: their stamps.

    Raises:
        CorruptFile: two tensors get the same name, one is not strided or is larger than its storage, dicts are nested
            too deeply (or hold themselves), or there are more than `header.KEYS_LIMIT` values.
        TypeError: `state_dict` is no dict.
    """
    _check_mapping(state_dict)
    where = files[0] if files else "the given state_dict"
    for _ in range(_DEPTH):
        if len(state_dict) != 1 or next(iter(state_dict)) not in _WRAPPERS:
            break
        if not isinstance(next(iter(state_dict.values())), Mapping):
            break
        state_dict = next(iter(state_dict.values()))
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in _flatten(state_dict, where):
        if key in tensors:
            raise CorruptFile(f"{where}: two tensors are called {key!r} once nested names are joined by dots")
        _check_dense(key, tensor, where)
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
    return Header(infos, {}, files, tensors, shapes, stamps or {}, notes, tuple(_prefixes(state_dict)))


def without_wrappers(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the dict of tensors inside a trainer's dict, however deep; `state_dict` itself if it holds tensors, or if
    two dicts in it do, an optimizer's aside.

    Raises:
        TypeError: `state_dict` is no dict.
    """
    _check_mapping(state_dict)
    for _ in range(_DEPTH):
        if any(isinstance(value, torch.Tensor) for value in state_dict.values()):
            break
        inside = [value for key, value in state_dict.items() if _is_wrapper(key, value)]
        if len(inside) != 1:
            break
        state_dict = inside[0]
    return state_dict


def _check_mapping(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict={shown(state_dict)}: expected a dict key -> tensor")


def _prefixes(state_dict: Mapping[Any, Any], depth: int = 0) -> Iterator[str]:
    """Yield the prefixes of the dicts, nested at most three deep, that hold tensors, an optimizer's aside:
    "params_ema.", "model.state_dict.".
    """
    for key, value in state_dict.items():
        if not _is_wrapper(key, value):
            continue
        if any(isinstance(each, torch.Tensor) for each in value.values()):
            yield f"{key}."
        if depth < 2:
            yield from (f"{key}.{inner}" for inner in _prefixes(value, depth + 1))


def _is_wrapper(key: Any, value: Any) -> bool:
    """Whether an entry of a trainer's dict is a dict that may hold weights."""
    is_named = isinstance(key, str) and not _NOT_WEIGHTS.fullmatch(key)
    return (
        is_named and isinstance(value, Mapping) and any(isinstance(v, torch.Tensor | Mapping) for v in value.values())
    )


def _flatten(nested: Mapping[Any, Any], where: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) pairs of a nested dict in its order, keys joined by dots; a LoRA's alpha as a tensor, other
    values are left out.

    Raises:
        CorruptFile: dicts are nested too deeply, or there are too many values.
    """
    count = 0
    levels = [("", iter(nested.items()))]
    while levels:
        prefix, items = levels[-1]
        for key, value in items:
            count += 1
            check_count(count, where)
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{key}", value
            elif is_alpha(key, value):
                yield f"{prefix}{key}", torch.tensor(float(value))
            elif isinstance(value, Mapping):
                if len(levels) >= _DEPTH:
                    raise CorruptFile(f"{where} holds dicts nested more than {_DEPTH} deep, or one that holds itself")
                levels.append((f"{prefix}{key}.", iter(value.items())))
                break
        else:
            levels.pop()


def is_alpha(key: Any, value: Any) -> bool:
    """Return whether an entry of a state dict is the alpha of a LoRA as a plain number, as some trainers write it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and str(key).endswith("alpha")


def _check_dense(key: str, tensor: torch.Tensor, where: Path | str) -> None:
    if tensor.layout is not torch.strided:
        raise CorruptFile(f"{where}: {key!r} is a {tensor.layout} tensor; expected a dense one")
    if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return
    size, stored = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
    # Small ones are accepted: an expanded scalar is a legitimate tensor.
    if size > stored + _EXPANDED:
        raise CorruptFile(
            f"{where}: {key!r} of shape {tuple(tensor.shape)} would take {size} bytes, and {stored} are stored: its "
            f"elements are repeated by strides. Save it again after contiguous()."
        )


def _check_archive(file: Path, size: int) -> None:
    """Raise CorruptFile if a zip archive would expand to more than the file's size; torch compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    check_count(len(entries), file)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CorruptFile(f"{file} is a compressed archive, which no torch checkpoint is. Unpack it, or save it again.")
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise CorruptFile(f"{file} has {size} bytes, and its contents say {total}: it is damaged. Fetch it again.")


def _shapes(nested: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _shapes(value) if isinstance(value, Mapping) else tuple(value.shape)
        for key, value in nested.items()
        if isinstance(value, Mapping | torch.Tensor)
    }
