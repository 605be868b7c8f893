"""Reading what a checkpoint holds without reading it: names, shapes, dtypes and where the bytes are. No torch."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.files import find
from diffsynth.errors import CorruptFile, KeyMismatch, NoFiles

Shape = tuple[int, ...]

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

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
    "model.",
)
"""What trainers and other tools put before every key; tried only when the bare keys are not recognised."""

_NAMED_TEXT_ENCODER = re.compile(r"text_encoders\.[^.]+\.(transformer\.)?")

_ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


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
    shapes of a pickle of dicts in dicts; `tensors` has such keys joined by dots.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    tensors_in_memory: Mapping[str, Any] | None = None
    nested: Mapping[str, Any] | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key -> shape."""
        return {key: info.shape for key, info in self.tensors.items()}


def read_config(config: ModelConfig, *, resolve: Callable[[str], list[Path] | None] | None = None) -> Header:
    """The header of a `ModelConfig`'s files (see `files.find`), or of the tensors it carries."""
    if config.state_dict is not None:
        from diffsynth.core.loader import pickled

        return pickled.of_state_dict(config.state_dict)
    return read(find(config, resolve=resolve))


def read(files: Iterable[Path]) -> Header:
    """The merged header of one checkpoint's files.

    Raises:
        CorruptFile: truncated, or no checkpoint.
        KeyMismatch: two files hold one key with different shapes.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    in_memory: dict[str, Any] = {}
    files = tuple(files)
    nested = None
    for file in files:
        if file.suffix.lower() in PICKLE_SUFFIXES:
            from diffsynth.core.loader import pickled

            part = pickled.read(file)
            in_memory.update(part.tensors_in_memory or {})
            nested = part.nested
        else:
            part = read_safetensors(file)
        for key, info in part.tensors.items():
            if key in tensors and tensors[key].shape != info.shape:
                raise KeyMismatch(
                    f"{key!r} is {tensors[key].shape} in {tensors[key].file} and {info.shape} in {file}; "
                    f"these files are not parts of one checkpoint"
                )
            tensors[key] = info
        metadata.update(part.metadata)
    return Header(tensors, metadata, files, in_memory or None, nested if len(files) == 1 else None)


def read_safetensors(file: Path) -> Header:
    """The header of one safetensors file: 8 bytes of length, then JSON, then the data it points into.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: what is wrong, and with which file.
    """
    reject_other_kinds(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"PK"):
            raise CorruptFile(f"{file} is a zip archive. If it is a torch pickle, name it .pth or .bin.")
        if size < 8:
            raise CorruptFile(f"{file} is not a safetensors file: it has {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if stream.read(1) not in (b"{", b""):
            raise CorruptFile(f"{file} is not a safetensors file: it has no header. Give the path of the weights.")
        stream.seek(8)
        if length > size - 8:
            raise CorruptFile(
                f"{file} is truncated: its header says {length} bytes, {size - 8} follow. Fetch it again."
            )
        text = stream.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        base = 8 + length
        tensors = {
            key: TensorInfo(
                entry["dtype"],
                tuple(entry["shape"]),
                file,
                base + entry["data_offsets"][0],
                base + entry["data_offsets"][1],
            )
            for key, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CorruptFile(f"{file} is not a safetensors file: its header does not parse ({error})") from None
    _check_ranges(file, tensors, size)
    return Header(tensors, metadata, (file,))


def signature(shapes: Mapping[str, Any]) -> str:
    """The md5 identity of a layout, bit-compatible with published hashes.

    Every tensor gives `key:d0_d1` and `key`, a nested dict `key|` and its own entries; sorted, joined by commas.

    Args:
        shapes: key -> shape, or a nested mapping of the same kind.
    """
    return hashlib.md5(_signed_text(shapes).encode("utf-8")).hexdigest()


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
    # A checkpoint of everything in one file, as other programs write it, names its text encoders too.
    named = {match[0]: None for key in keys if (match := _NAMED_TEXT_ENCODER.match(key))}
    return (*named, *(prefix for prefix in WRAPPER_PREFIXES if any(key.startswith(prefix) for key in keys)))


def _check_ranges(file: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    for key, info in tensors.items():
        if not 0 <= info.start <= info.end:
            raise CorruptFile(f"{file}: tensor {key!r} begins at byte {info.start} and ends at {info.end}")
        if info.end > size:
            end = max(other.end for other in tensors.values())
            raise CorruptFile(f"{file} is truncated: its header says {end} bytes, the file has {size}. Fetch it again.")
        item = _ITEM_SIZES.get(info.dtype)
        count = 1
        for extent in info.shape:
            count *= extent
        if item is not None and info.end - info.start != item * count:
            raise CorruptFile(
                f"{file}: tensor {key!r} of shape {info.shape} and dtype {info.dtype} "
                f"spans {info.end - info.start} bytes, expected {item * count}"
            )


def reject_other_kinds(file: Path) -> None:
    """Say what a file is that no reader of ours can read.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: empty, a Git-LFS pointer, a GGUF file or a web page.
    """
    if not file.is_file():
        what = "is a folder; name the files in it" if file.is_dir() else "does not exist"
        raise NoFiles(f"{file} {what}")
    with file.open("rb") as stream:
        start = stream.read(8)
    if not start:
        raise CorruptFile(f"{file} is empty. Fetch it again.")
    if start.startswith(b"version "):
        raise CorruptFile(f"{file} is a Git-LFS pointer, not the weights. Run: git lfs pull")
    if start.startswith(b"GGUF"):
        raise CorruptFile(f"{file} is a GGUF file; diffsynth reads safetensors. Convert it first.")
    if start[:1] == b"<":
        raise CorruptFile(f"{file} is a web page, not a checkpoint: the download was answered with an error page.")
