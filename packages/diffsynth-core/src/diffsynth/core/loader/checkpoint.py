"""Reading the header of a checkpoint in any format. torch is imported only for pickles and tensors in memory.

`header.read` is the part for safetensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from diffsynth.core.loader import header
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.files import PICKLE_SUFFIXES, find
from diffsynth.core.loader.header import Header


def read_config(config: ModelConfig, *, resolve: Callable[[str], list[Path] | None] | None = None) -> Header:
    """Return the `Header` (dtype and shape of each tensor) of a `ModelConfig`'s files, or of the state dict that it
    carries.

    Args:
        config: the checkpoint.
        resolve: as for `files.find`.

    Raises:
        CheckpointError: as for `files.find` and `read_files`.
    """
    if config.state_dict is not None:
        from diffsynth.core.loader import pickled

        return pickled.of_state_dict(config.state_dict)
    # A policy reads files again later, in whatever folder the process works then.
    return read_files([path.absolute() for path in find(config, resolve=resolve)])


def read_files(files: Iterable[Path]) -> Header:
    """Return one `Header` (dtype and shape of each tensor) for all files of a checkpoint, or of a folder's only
    checkpoint.

    Args:
        files: safetensors files, or torch pickles, which are told by their suffix.

    Raises:
        NoFiles: a file does not exist, or a folder holds no checkpoint or several.
        CorruptFile: a file is truncated, or no checkpoint.
        KeyMismatch: the files are not parts of one checkpoint.
    """
    return header.read(files, _read_file)


def _read_file(file: Path) -> Header:
    if file.suffix.lower() not in PICKLE_SUFFIXES:
        return header.read_safetensors(file)
    from diffsynth.core.loader import pickled

    return pickled.read(file)
