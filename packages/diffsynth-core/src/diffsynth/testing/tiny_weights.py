"""Random weights in which nothing is neutral, and files of them as a hub has them."""

from __future__ import annotations

import fnmatch
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save
from torch import Tensor

from diffsynth.core.loader.header import PICKLE_SUFFIXES

SHARDS = 2


@dataclass(frozen=True)
class TinyTensor:
    """What a small file says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


TinyFile = Mapping[str, TinyTensor]
"""Published key -> its tensor; one logical file, however many shards it becomes."""


def write_weights(folder: Path, pattern: str, contents: TinyFile, *, file_stem: str) -> list[Path]:
    """Draw the tensors of a file and write them where `pattern` will find them.

    A glob becomes numbered shards with their index, a plain name one file. None carries metadata of ours.

    Args:
        folder: of the repository.
        pattern: inside it; its last part may hold `*`.
        contents: what to write.
        file_stem: how files begin where the pattern leaves it open.

    Returns:
        the files of tensors.

    Raises:
        ValueError: the pattern names no file, or none that is called like this.
    """
    names, index = file_names(pattern, file_stem, shards=min(SHARDS, len(contents)))
    tensors = draw(contents, seed=f"{folder.parent.name}/{folder.name}:{pattern}")
    keys = list(contents)
    where = {key: names[number * len(names) // len(keys)] for number, key in enumerate(keys)}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _save({key: tensors[key] for key in keys if where[key] == name}, folder / name)
    if index:
        shards = {key: PurePosixPath(name).name for key, name in where.items()}
        total = sum(tensor.nbytes for tensor in contents.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": shards}, indent=2)
        (folder / index).write_text(text + "\n", encoding="utf-8")
    return [folder / name for name in names]


def file_names(pattern: str, file_stem: str, *, shards: int) -> tuple[list[str], str]:
    """Names that a pattern matches, and that of their index; the index is empty for a single file.

    Raises:
        ValueError: the pattern leaves a folder open, names a folder, or matches no such name.
    """
    place, _, last = pattern.rpartition("/")
    begin, star, _ = last.partition("*")
    suffix = PurePosixPath(last).suffix
    if "*" in place or not suffix or any(mark in pattern for mark in "?["):
        raise ValueError(f"pattern {pattern!r}: expected a file, or a glob over files of one folder such as 'a/*.b'")
    if not star:
        return [pattern], ""
    stem = f"{place}/" * bool(place) + (begin.rstrip("-_.") or file_stem)
    names = [f"{stem}-{number:05d}-of-{shards:05d}{suffix}" for number in range(1, shards + 1)]
    if shards == 1:
        names = [f"{stem}{suffix}"]
    if unmatched := [name for name in names if not fnmatch.fnmatchcase(name, pattern)]:
        raise ValueError(f"pattern {pattern!r} does not match {unmatched[0]!r}; set file_stem of its CheckpointSpec")
    return names, f"{stem}{suffix}.index.json" if shards > 1 else ""


def draw(contents: TinyFile, *, seed: str) -> dict[str, Tensor]:
    """Tensors, the same for one seed: matrices at 1/sqrt(fan_in), norms 1 +- 0.1, biases at 0.1, integers 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return {key: _drawn(key, tensor, generator) for key, tensor in contents.items()}


def _drawn(key: str, tensor: TinyTensor, generator: torch.Generator) -> Tensor:
    shape = tensor.shape
    if not tensor.dtype.is_floating_point:
        return torch.ones(shape, dtype=tensor.dtype)
    if key.endswith("bias"):
        values = 0.1 * torch.randn(shape, generator=generator)
    elif len(shape) < 2:
        values = 0.9 + 0.2 * torch.rand(shape, generator=generator)
    else:
        fan_in = prod(shape[1:]) if shape[0] > 1 else 1  # a single row is a learned token
        values = torch.randn(shape, generator=generator) / max(fan_in, 1) ** 0.5
    return values.to(tensor.dtype)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        torch.save(tensors, path)
    else:
        path.write_bytes(save(tensors, metadata={"format": "pt"}))
