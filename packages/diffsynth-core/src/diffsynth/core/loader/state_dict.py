"""Files of tensors as plain dicts: to load, to look at, to identify."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth.core.loader import pickled
from diffsynth.core.loader.files import PICKLE_SUFFIXES
from diffsynth.core.loader.header import Header, read, read_safetensors, signature
from diffsynth.core.loader.reader.source import read_tensors

logger = logging.getLogger(__name__)

File = str | Path


def load_state_dict(
    file_path: File | Sequence[File],
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    pin_memory: bool = False,
    verbose: int = 0,
) -> dict[str, Any]:
    """All tensors of a checkpoint.

    Args:
        file_path: safetensors or pickle, by suffix; several files are parts of one checkpoint.
        torch_dtype: of floating tensors; None keeps the file's.
        device: where they go.
        pin_memory: pin those that stay in host memory; needs an accelerator.
        verbose: 1 logs each file.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: truncated, no checkpoint, or a pickle that would run code.
    """
    state_dict: dict[str, Any] = {}
    for file in _files(file_path):
        if verbose:
            logger.info("loading %s", file)
        load = load_state_dict_from_bin if _is_pickle(file) else load_state_dict_from_safetensors
        state_dict |= load(file, torch_dtype, device)
    return _pinned(state_dict) if pin_memory else state_dict


def load_state_dict_from_safetensors(
    file_path: File, torch_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All tensors of a safetensors file; arguments and errors as for `load_state_dict`."""
    return read_tensors(read_safetensors(Path(file_path)), device=device, dtype=torch_dtype)


def load_state_dict_from_bin(
    file_path: File, torch_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """All tensors of a pickle, nested as they are in it, without a single `state_dict`, `module` or `model_state`.

    Arguments and errors as for `load_state_dict`.
    """
    header = pickled.read(Path(file_path))
    # The file is mapped: tensors that stayed in it would change with it.
    tensors = {
        key: placed(tensor.clone(), torch_dtype, device) for key, tensor in (header.tensors_in_memory or {}).items()
    }
    return tensors if header.nested is None else _nested(header.nested, tensors)


def load_metadata_from_safetensors(file_path: File | Sequence[File]) -> dict[str, str]:
    """The metadata in the header, that of several files merged; errors as for `load_state_dict`."""
    return {key: text for file in _files(file_path) for key, text in read_safetensors(file).metadata.items()}


def load_keys_dict(file_path: File | Sequence[File]) -> dict[str, Any]:
    """Name -> shape, nested where a pickle is; of safetensors only the header is read. Raises like `load_state_dict`.

    Raises:
        KeyMismatch: two files hold one name with different shapes.
    """
    return _shapes(read(_files(file_path)))


def hash_model_file(path: File | Sequence[File], with_shape: bool = True) -> str:
    """The md5 that identifies a layout by its names and shapes, whatever the values and dtypes are.

    Args:
        path: a file, or the files of one checkpoint.
        with_shape: False leaves the shapes out, so that sizes of one architecture are alike.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: truncated, no checkpoint, or a pickle that would run code.
        KeyMismatch: two files hold one name with different shapes.
    """
    return _hash(_shapes(read(_files(path))), with_shape)


def hash_state_dict_keys(state_dict: Mapping[str, Any], with_shape: bool = True) -> str:
    """`hash_model_file` of tensors that are in memory; what is no tensor does not count."""
    return _hash(_shapes(pickled.of_state_dict(state_dict)), with_shape)


def placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    """A tensor on a device, in `dtype` if it is floating; None keeps its own."""
    return tensor.to(device, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)


def _files(path: File | Sequence[File]) -> list[Path]:
    return [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]


def _is_pickle(file: Path) -> bool:
    return file.suffix.lower() in PICKLE_SUFFIXES


def _hash(shapes: Mapping[str, Any], with_shape: bool) -> str:
    return signature(shapes) if with_shape else hashlib.md5(_names(shapes).encode(), usedforsecurity=False).hexdigest()


def _names(shapes: Mapping[str, Any]) -> str:
    """What `signature` hashes, without the shapes."""
    return ",".join(sorted(f"{k}|{_names(v)}" if isinstance(v, Mapping) else k for k, v in shapes.items()))


def _shapes(header: Header) -> dict[str, Any]:
    return dict(header.nested) if header.nested is not None else header.shapes


def _nested(shapes: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    return {
        key: _nested(inside, tensors, f"{prefix}{key}.") if isinstance(inside, Mapping) else tensors[prefix + key]
        for key, inside in shapes.items()
    }


def _pinned(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _pinned(value) if isinstance(value, Mapping) else value.pin_memory() for key, value in state_dict.items()
    }
