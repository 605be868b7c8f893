"""Files of tensors as plain dicts: loading them, listing their keys, hashing their layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth.core import device as devices
from diffsynth.core.loader import pickled
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.files import PICKLE_SUFFIXES
from diffsynth.core.loader.header import Header, read_safetensors, signature
from diffsynth.core.loader.reader.source import read_tensors
from diffsynth.core.torch_defaults import torch_defaults
from diffsynth.errors import KeyMismatch, shown
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

File = str | Path


@torch_defaults()
def load_state_dict(
    file_path: File | Sequence[File],
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    pin_memory: bool = False,
    verbose: int = 0,
) -> dict[str, Any]:
    """Return a dict key -> tensor on `device` of all tensors in a checkpoint's files, floating ones in `torch_dtype`
    (None: as stored); nested dicts in a pickle stay nested.

    Args:
        file_path: a safetensors file or a pickle, told by the suffix; several files are parts of one checkpoint.
        torch_dtype: dtype of the floating tensors; None keeps the file's.
        device: the device that the tensors are put on.
        pin_memory: whether tensors in host memory are pinned; needs an accelerator.
        verbose: 1 logs the name of each file.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: a file is truncated, no checkpoint, or a pickle that would run code.
        KeyMismatch: two files have one key.
        TypeError: a `torch_dtype` that is no floating-point dtype.
    """
    _check_dtype(torch_dtype)
    state_dict: dict[str, Any] = {}
    for file in _files(file_path):
        if verbose:
            logger.info("loading %s", file)
        is_pickle = file.suffix.lower() in PICKLE_SUFFIXES
        load = load_state_dict_from_bin if is_pickle else load_state_dict_from_safetensors
        part = load(file, torch_dtype, device)
        if twice := part.keys() & state_dict.keys():
            raise KeyMismatch(
                f"{min(twice)!r} is in {file} and in a file before it: these files are no parts of one checkpoint. "
                f"Load them one by one."
            )
        state_dict |= part
    return _pinned(state_dict) if pin_memory else state_dict


def load_state_dict_from_safetensors(
    file_path: File, torch_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return a dict key -> tensor on `device` of all tensors of a safetensors file, floating ones in `torch_dtype`
    (None: as stored).

    Arguments and errors: see `load_state_dict`.
    """
    _check_dtype(torch_dtype)
    return read_tensors(read_safetensors(Path(file_path)), device=device, dtype=torch_dtype)


def load_state_dict_from_bin(
    file_path: File, torch_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return a dict key -> tensor on `device` of all tensors of a torch pickle, nested as they are in it, floating ones
    in `torch_dtype` (None: as stored).

    A single `state_dict`, `module` or `model_state` around them is removed. Arguments and errors: see
    `load_state_dict`.
    """
    _check_dtype(torch_dtype)
    header = pickled.read(Path(file_path))
    # The file is mapped: without the copy the tensors would change when the file does.
    tensors = {
        key: placed(tensor.clone(), torch_dtype, device) for key, tensor in (header.tensors_in_memory or {}).items()
    }
    return tensors if header.nested is None else _nested(header.nested, tensors)


def load_metadata_from_safetensors(file_path: File | Sequence[File]) -> dict[str, str]:
    """Return a dict name -> text of the metadata in one or more safetensors files; of equal names the last file's text
    stays.

    Errors: see `load_state_dict`.
    """
    return {key: text for file in _files(file_path) for key, text in read_safetensors(file).metadata.items()}


def load_keys_dict(file_path: File | Sequence[File]) -> dict[str, Any]:
    """Return a dict key -> shape of all tensors of a checkpoint, nested where a pickle is; of safetensors only the
    header is read.

    Raises:
        NoFiles, CorruptFile: as for `load_state_dict`.
        KeyMismatch: two files hold one key with different shapes.
    """
    return _shapes(read_files(_files(file_path)))


def hash_model_file(path: File | Sequence[File], with_shape: bool = True) -> str:
    """Return the md5 (hexadecimal text) of a checkpoint's keys and, if `with_shape`, shapes; values and dtypes do not
    matter.

    Args:
        path: a file, or the files of one checkpoint.
        with_shape: False leaves the shapes out, so that all sizes of an architecture have one hash.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: a file is truncated, no checkpoint, or a pickle that would run code.
        KeyMismatch: two files hold one key with different shapes.
    """
    return _hash(_shapes(read_files(_files(path))), with_shape)


def hash_state_dict_keys(state_dict: Mapping[str, Any], with_shape: bool = True) -> str:
    """Return the md5 (hexadecimal text) of the keys and, if wanted, shapes of a dict of tensors, as `hash_model_file`
    does for files.

    Values that are no tensors are ignored.
    """
    return _hash(_shapes(pickled.of_state_dict(state_dict)), with_shape)


def placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    """Return `tensor` on `device`, converted to `dtype` if it is floating and `dtype` is not None, else in its own
    dtype.
    """
    return tensor.to(device, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)


def _check_dtype(torch_dtype: torch.dtype | None) -> None:
    if torch_dtype is not None:
        devices.check_floating(torch_dtype, stored=True)


def _files(path: File | Sequence[File]) -> list[Path]:
    files = [path] if isinstance(path, str | Path) else path
    if not isinstance(files, Sequence) or not all(isinstance(each, str | Path) for each in files):
        raise TypeError(f"path={shown(path)}: expected a path, or a list of the files of one checkpoint")
    return [Path(each) for each in files]


def _hash(shapes: Mapping[str, Any], with_shape: bool) -> str:
    return signature(shapes) if with_shape else hashlib.md5(_names(shapes).encode(), usedforsecurity=False).hexdigest()


def _names(shapes: Mapping[str, Any]) -> str:
    """Return the text to hash for a dict without its shapes: sorted keys joined by commas, `key|` before the text of a
    nested dict.
    """
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
