"""Reading what a checkpoint holds without reading it: names, shapes, dtypes and where the bytes are. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.dtypes import BITS
from diffsynth.core.loader.explain import kinds
from diffsynth.core.loader.files import PICKLE_SUFFIXES, find, only_checkpoint
from diffsynth.errors import CorruptFile, KeyMismatch, shortened

Shape = tuple[int, ...]

ARCHITECTURE_KEY = "diffsynth.architecture"
CONFIG_KEY = "diffsynth.config"
LAYOUT_KEY = "diffsynth.layout"
SAVE_KEY = "diffsynth.save"
"""What our own files say of themselves in their metadata: architecture, the JSON of its config's fields, the published
layout whose names the file has, and which call of `save_checkpoint` wrote it."""

HEADER_LIMIT = 100_000_000
"""Bytes of JSON that the format allows; a longer header is a damaged length."""

WRAPPER_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "pipe.",
    "first_stage_model.",
    "vae.",
    "transformer.",
    "text_encoder.",
    "module.",
    "_orig_mod.",
    "state_dict.",
    "model.",
)
"""What trainers and other tools put before every key; tried only when the bare keys are not recognised."""

_NAMED_TEXT_ENCODER = re.compile(r"text_encoders\.[^.]+\.(transformer\.)?")


@dataclass(frozen=True)
class FileStamp:
    """What tells a file from one that was put in its place: bytes, time of the last change, and its number on disk."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> FileStamp:
        """The stamp of a path or an open descriptor.

        Raises:
            OSError: there is no such file.
        """
        stat = os.stat(file)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Args:
        dtype: as safetensors spells it, "BF16".
        shape: row-major.
        file: where it is; None for tensors that are in memory.
        start, end: byte range in the file.
    """

    dtype: str
    shape: Shape
    file: Path | None = None
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Header:
    """All tensors of one logical checkpoint, which may be several files.

    `tensors_in_memory` holds the tensors themselves where the source is a pickle or a given state dict, `nested` the
    shapes of a pickle of dicts in dicts; `tensors` has such keys joined by dots. `stamps` remembers the files as they
    were when this was read.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    tensors_in_memory: Mapping[str, Any] | None = None
    nested: Mapping[str, Any] | None = None
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key -> shape."""
        return {key: info.shape for key, info in self.tensors.items()}

    @property
    def where(self) -> str:
        """Its files, for a message."""
        if not self.files:
            return "the given state_dict"
        return shortened(self.files, 1)

    def check_unchanged(self, file: Path, descriptor: int | None = None) -> None:
        """Hold a file to what it was when this header was read.

        Args:
            file: one of `files`.
            descriptor: of the file as it was opened; None asks what is there under its name.

        Raises:
            CorruptFile: it was replaced or written to since, or is gone.
        """
        if (before := self.stamps.get(file)) is None:
            return
        try:
            now = FileStamp.of(file if descriptor is None else descriptor)
        except OSError:
            raise CorruptFile(f"{file} is gone since its header was read. Load it again.") from None
        if now != before:
            size = "" if now.size == before.size else f": it had {before.size} bytes and has {now.size} now"
            raise CorruptFile(f"{file} changed since its header was read{size}. Load it again.")


def read_config(config: ModelConfig, *, resolve: Callable[[str], list[Path] | None] | None = None) -> Header:
    """The header of a `ModelConfig`'s files (see `files.find`), or of the tensors it carries."""
    if config.state_dict is not None:
        from diffsynth.core.loader import pickled

        return pickled.of_state_dict(config.state_dict)
    return read(find(config, resolve=resolve))


def read(files: Iterable[Path]) -> Header:
    """The merged header of one checkpoint's files, or of the one checkpoint in a folder.

    Raises:
        NoFiles: a file is not there, or a folder holds no checkpoint or several.
        CorruptFile: truncated, or no checkpoint.
        KeyMismatch: these are not parts of one checkpoint.
    """
    files = tuple(files)
    if len(files) == 1 and files[0].is_dir():
        files = tuple(only_checkpoint(files[0]))
    parts = [_read_one(file) for file in files]
    if len(parts) == 1:
        return parts[0]
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    in_memory: dict[str, Any] = {}
    stamps: dict[Path, FileStamp] = {}
    for file, part in zip(files, parts, strict=True):
        _check_same_checkpoint(tensors, metadata, part, file)
        tensors |= part.tensors
        metadata |= part.metadata
        in_memory |= part.tensors_in_memory or {}
        stamps |= part.stamps
    return Header(tensors, metadata, files, in_memory or None, None, stamps)


def _read_one(file: Path) -> Header:
    if file.suffix.lower() not in PICKLE_SUFFIXES:
        return read_safetensors(file)
    from diffsynth.core.loader import pickled

    return pickled.read(file)


def _check_same_checkpoint(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], part: Header, file: Path
) -> None:
    for key in part.tensors.keys() & tensors.keys():
        if tensors[key].shape != part.tensors[key].shape:
            raise KeyMismatch(
                f"{key!r} is {tensors[key].shape} in {tensors[key].file} and {part.tensors[key].shape} in {file}; "
                f"these files are not parts of one checkpoint"
            )
    for key in (ARCHITECTURE_KEY, CONFIG_KEY, LAYOUT_KEY, SAVE_KEY):
        if key in metadata and metadata[key] != part.metadata.get(key, metadata[key]):
            raise KeyMismatch(
                f"{file} was saved with {key}={part.metadata[key]}, the files before it with {metadata[key]}; "
                f"these files are not parts of one checkpoint. Save or fetch all of them again."
            )


def read_safetensors(file: Path) -> Header:
    """The header of one safetensors file: 8 bytes of length, then JSON, then the data it points into.

    Gaps between tensors and bytes behind the last are allowed: nothing reads them. Tensors that overlap are not.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: what is wrong, and with which file.
    """
    with kinds.open_weights(file) as stream:
        stamp = FileStamp.of(stream.fileno())
        text, base = _header_text(file, stream, stamp.size)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        if not isinstance(entries, dict):
            raise ValueError(f"it is a {type(entries).__name__}")
        metadata = _metadata(entries.pop("__metadata__", {}))
        tensors = {key: _tensor_info(key, entry, file, base) for key, entry in entries.items()}
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CorruptFile(
            f"{file} is not a safetensors file: its header does not parse ({reason}). Fetch it again."
        ) from None
    _check_ranges(file, tensors, stamp.size)
    return Header(tensors, metadata, (file,), stamps={file: stamp})


def _header_text(file: Path, stream: BinaryIO, size: int) -> tuple[bytes, int]:
    """The JSON, and where the data begins. What is read is at most the format's limit, whatever the file says."""
    start = stream.read(9)
    if size < 8:
        raise CorruptFile(f"{file} is not a safetensors file: it has {size} bytes")
    length = int.from_bytes(start[:8], "little")
    if start[8:] not in (b"{", b"") or not length:
        raise CorruptFile(f"{file} is not a safetensors file: it has no header. Give the path of the weights.")
    if length > HEADER_LIMIT:
        raise CorruptFile(
            f"{file} is damaged: it announces a header of {length} bytes, and the format allows {HEADER_LIMIT}. "
            f"Fetch it again."
        )
    if length > size - 8:
        raise CorruptFile(f"{file} is truncated: its header says {length} bytes, {size - 8} follow. Fetch it again.")
    return start[8:] + stream.read(length - 1), 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return entries


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _metadata(entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("its __metadata__ is not a mapping of text to text")
    return entry


def _tensor_info(key: str, entry: Any, file: Path, base: int) -> TensorInfo:
    key.encode("utf-8")  # a lone surrogate is no text: UnicodeEncodeError, which is a ValueError
    if not isinstance(entry, dict) or (missing := {"dtype", "shape", "data_offsets"} - entry.keys()):
        what = f"lacks {', '.join(sorted(missing))}" if isinstance(entry, dict) else f"is a {type(entry).__name__}"
        raise ValueError(f"the entry of {key!r} {what}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{key!r} has dtype {dtype!r}; expected one of {', '.join(BITS)}")
    if not _are_sizes(shape):
        raise ValueError(f"{key!r} has shape {shape!r:.100}; expected extents from 0 up")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{key!r} has data_offsets {offsets!r:.100}; expected where it begins and ends")
    return TensorInfo(dtype, tuple(shape), file, base + offsets[0], base + offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_ranges(file: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    if (end := max((info.end for info in tensors.values()), default=0)) > size:
        raise CorruptFile(f"{file} is truncated: its header says {end} bytes, the file has {size}. Fetch it again.")
    before, reached = "", 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end < info.start:
            raise CorruptFile(f"{file}: tensor {key!r} begins at byte {info.start} and ends at {info.end}")
        expected = -(-prod(info.shape) * BITS[info.dtype] // 8)
        if info.end - info.start != expected:
            raise CorruptFile(
                f"{file}: tensor {key!r} of shape {info.shape} and dtype {info.dtype} "
                f"spans {info.end - info.start} bytes, expected {expected}"
            )
        if expected and info.start < reached:
            raise CorruptFile(f"{file}: tensors {before!r} and {key!r} overlap at byte {info.start}. Fetch it again.")
        if expected:
            before, reached = key, info.end


def signature(shapes: Mapping[str, Any]) -> str:
    """The md5 identity of a layout, bit-compatible with published hashes.

    Every tensor gives `key:d0_d1` and `key`, a nested dict `key|` and its own entries; sorted, joined by commas.

    Args:
        shapes: key -> shape, or a nested mapping of the same kind.
    """
    return hashlib.md5(_signed_text(shapes).encode("utf-8"), usedforsecurity=False).hexdigest()


def _signed_text(shapes: Mapping[str, Any]) -> str:
    entries = []
    for key, value in shapes.items():
        if isinstance(value, Mapping):
            entries.append(f"{key}|{_signed_text(value)}")
        else:
            entries += [f"{key}:{'_'.join(map(str, value))}", key]
    return ",".join(sorted(entries))


def strip_prefix(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def wrapper_prefixes(keys: Iterable[str]) -> tuple[str, ...]:
    """The wrapper prefixes that stand before some of these keys, the more specific first.

    Which of them really wraps a component only recognition can tell: Qwen3's own names begin with `model.`.
    """
    keys = list(keys)
    heads = {key.partition(".")[0] for key in keys}
    possible = [prefix for prefix in WRAPPER_PREFIXES if prefix.partition(".")[0] in heads]
    # A checkpoint of everything in one file, as other programs write it, names its text encoders too.
    several = "text_encoders" in heads
    named = {match[0]: None for key in keys if several and (match := _NAMED_TEXT_ENCODER.match(key))}
    return (*named, *(prefix for prefix in possible if any(key.startswith(prefix) for key in keys)))
