"""The header of a checkpoint: keys, shapes, dtypes and byte offsets of its tensors. No torch.

Pickles and tensors in memory get a header, too: see `checkpoint.read_files` and `pickled`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from diffsynth.core.loader import file_kinds, quantization_notes
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.dtypes import BITS
from diffsynth.core.loader.files import only_checkpoint
from diffsynth.errors import CorruptFile, KeyMismatch, shortened

ARCHITECTURE_KEY = "diffsynth.architecture"
CONFIG_KEY = "diffsynth.config"
LAYOUT_KEY = "diffsynth.layout"
SAVE_KEY = "diffsynth.save"
"""Metadata keys of files that `save_checkpoint` writes: the architecture, its config's fields as JSON, the published
layout whose names the file has, and an id of the call that wrote it."""

HEADER_LIMIT = 100_000_000
"""Bytes of JSON that the format allows; a larger length field is damaged."""

KEYS_LIMIT = 100_000
"""Tensors of one file; the largest published diffusion model has fewer than 10,000."""

DIMENSIONS_LIMIT = 64
"""Axes of one tensor, as in torch."""

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
"""Prefixes that trainers and other tools put before every key."""

_NAMED_TEXT_ENCODER = re.compile(r"text_encoders\.[^.]+\.(transformer\.)?")


@dataclass(frozen=True)
class FileStamp:
    """A file's size in bytes, time of the last change and inode, which tell whether it was replaced or changed."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> FileStamp:
        """Return the `FileStamp` (size, time of the last change, inode) of a path or an open descriptor.

        Raises:
            OSError: there is no such file.
        """
        stat = os.stat(file)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True)
class TensorInfo:
    """Dtype, shape and place of one tensor.

    Args:
        dtype: its name in the safetensors format, `"BF16"`.
        shape: extents, row-major.
        file: the file that holds it; None for a tensor in memory.
        start, end: offsets in the file of its first byte and behind its last.
    """

    dtype: str
    shape: Shape
    file: Path | None = None
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Header:
    """All tensors of one checkpoint, which may be several files.

    Args:
        tensors: key -> dtype, shape and place; keys of nested dicts are joined by dots.
        metadata: the text entries of the safetensors headers.
        files: the files, in order; empty for a state dict.
        tensors_in_memory: key -> tensor, if the source is a pickle or a state dict.
        nested: key -> shape, nested as the pickle is; None if it is flat.
        stamps: file -> its stamp when the header was read.
        notes: layer -> what a note in the files says on how its weight is quantised; see `quantization_notes`.
        prefixes: the prefixes of the dicts in a pickle that hold tensors, such as "params_ema."; empty if it is flat.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    tensors_in_memory: Mapping[str, Any] | None = None
    nested: Mapping[str, Any] | None = None
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """A dict key -> shape (a tuple of ints) of each tensor."""
        return {key: info.shape for key, info in self.tensors.items()}

    @property
    def where(self) -> str:
        """Text that names the checkpoint's files in messages, "a.safetensors and 2 more"; "the given state_dict"
        without files.
        """
        if not self.files:
            return "the given state_dict"
        return shortened(self.files, 1)

    def check_unchanged(self, file: Path, descriptor: int | None = None) -> None:
        """Raise CorruptFile if `file` was changed, replaced or removed since this header was read; do nothing for a
        file without a stamp.

        Args:
            file: one of `files`.
            descriptor: descriptor of the opened file; None checks the file that has this name now.

        Raises:
            CorruptFile: the file was replaced, written to or removed.
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


def read(files: Iterable[Path], read_file: Callable[[Path], Header] | None = None) -> Header:
    """Return one `Header` (dtype, shape and place of each tensor) for a checkpoint's files, or for a folder's only
    checkpoint; raise KeyMismatch if they are of different ones.

    Args:
        files: the files, or one folder.
        read_file: the function that reads one file; None is `read_safetensors`.

    Raises:
        NoFiles: a file does not exist, or a folder holds no checkpoint or several.
        CorruptFile: a file is truncated, or no checkpoint.
        KeyMismatch: the files are not parts of one checkpoint.
    """
    read_file = read_safetensors if read_file is None else read_file
    files = tuple(files)
    if len(files) == 1 and files[0].is_dir():
        files = tuple(only_checkpoint(files[0]))
    parts = [read_file(file) for file in files]
    if len(parts) == 1:
        return parts[0]
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    in_memory: dict[str, Any] = {}
    stamps: dict[Path, FileStamp] = {}
    notes: dict[str, Mapping[str, Any]] = {}
    prefixes: dict[str, None] = {}
    for file, part in zip(files, parts, strict=True):
        _check_same_checkpoint(tensors, metadata, part, file)
        tensors |= part.tensors
        metadata |= part.metadata
        in_memory |= part.tensors_in_memory or {}
        stamps |= part.stamps
        notes |= part.notes
        prefixes |= dict.fromkeys(part.prefixes)
    return Header(tensors, metadata, files, in_memory or None, None, stamps, notes, tuple(prefixes))


def _check_same_checkpoint(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], part: Header, file: Path
) -> None:
    for key in part.tensors.keys() & tensors.keys():
        if tensors[key].shape != part.tensors[key].shape:
            raise KeyMismatch(
                f"{key!r} is {tensors[key].shape} in {tensors[key].file} and {part.tensors[key].shape} in {file}; "
                f"these files are not parts of one checkpoint"
            )
        raise KeyMismatch(
            f"{key!r} is in {tensors[key].file or 'a file before it'} and in {file}: these files are several "
            f"checkpoints, or one and a part of it again. Name the files of one."
        )
    for key in (ARCHITECTURE_KEY, CONFIG_KEY, LAYOUT_KEY, SAVE_KEY):
        if key in metadata and metadata[key] != part.metadata.get(key, metadata[key]):
            raise KeyMismatch(
                f"{file} was saved with {key}={part.metadata[key]}, the files before it with {metadata[key]}; "
                f"these files are not parts of one checkpoint. Save or fetch all of them again."
            )


def read_safetensors(file: Path) -> Header:
    """Return the `Header` of one safetensors file: dtype, shape and byte offsets of each tensor, and the metadata.

    The file has 8 bytes of length, then JSON, then the tensors' data. Gaps between tensors and bytes behind the last
    one are accepted, overlapping tensors are not.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: the file is damaged or of another kind; the message says how.
    """
    try:
        with file_kinds.open_weights(file) as stream:
            stamp = FileStamp.of(stream.fileno())
            text, base = _header_text(file, stream, stamp.size)
            metadata, tensors = _parsed(file, text, base)
            _check_ranges(file, tensors, stamp.size)
            notes = quantization_notes.in_metadata(str(file), metadata)
            notes |= quantization_notes.in_stream(str(file), stream, tensors)
    except OSError as error:
        raise CorruptFile(f"{file} cannot be read: {error.strerror or error}") from None
    return Header(tensors, metadata, (file,), stamps={file: stamp}, notes=notes)


def _parsed(file: Path, text: bytes, base: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return a tuple: the metadata of a header, and a dict key -> dtype, shape and place of its tensors."""
    # Counted before they are parsed, which takes ten times the memory of the text. Metadata may hold colons, too.
    if text.count(b":") > 4 * KEYS_LIMIT + 10**6:
        raise CorruptFile(f"{file} has a header of more than {KEYS_LIMIT} tensors, the limit. Is it a checkpoint?")
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        if not isinstance(entries, dict):
            raise ValueError(f"it is a {type(entries).__name__}")
        metadata = _metadata(entries.pop("__metadata__", {}), file)
        check_count(len(entries), file)
        return metadata, {key: _tensor_info(key, entry, file, base) for key, entry in entries.items()}
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CorruptFile(
            f"{file} is not a safetensors file: its header does not parse ({reason}). Fetch it again."
        ) from None


def _header_text(file: Path, stream: BinaryIO, size: int) -> tuple[bytes, int]:
    """Return a tuple: a file's JSON header as bytes, and the byte offset at which the tensors' data begins in the file.

    It never reads more than the format's limit.
    """
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


def check_count(tensors: int, file: Path | str) -> None:
    """Raise CorruptFile if a file has more tensors than the limit.

    Args:
        tensors: their number.
        file: the file, for the message.

    Raises:
        CorruptFile: there are more than `KEYS_LIMIT`.
    """
    if tensors > KEYS_LIMIT:
        raise CorruptFile(f"{file} has {tensors} tensors, and the limit is {KEYS_LIMIT}. Is it a checkpoint?")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it has {next(name for name, count in counts.items() if count > 1)!r:.200} twice")
    return entries


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _metadata(entry: Any, file: Path) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"its __metadata__ is a {type(entry).__name__}")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise CorruptFile(
                f"{file}: its metadata has {shortened([repr(value)])} under {shortened([repr(key)])}, and safetensors "
                "allows only text. Write the file again with texts as values"
            )
    return entry


def _tensor_info(key: str, entry: Any, file: Path, base: int) -> TensorInfo:
    key.encode("utf-8")  # a lone surrogate is no text: UnicodeEncodeError, which is a ValueError
    if not isinstance(entry, dict) or (missing := {"dtype", "shape", "data_offsets"} - entry.keys()):
        what = f"lacks {', '.join(sorted(missing))}" if isinstance(entry, dict) else f"is a {type(entry).__name__}"
        raise ValueError(f"the entry of {key!r} {what}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{key!r} has dtype {dtype!r}; expected one of {', '.join(BITS)}")
    if isinstance(shape, list) and len(shape) > DIMENSIONS_LIMIT:
        raise ValueError(f"{key!r:.200} has {len(shape)} axes; expected at most {DIMENSIONS_LIMIT}")
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
    """Return the md5 (hexadecimal text) of a dict key -> shape, which may be nested; equal to the published hashes.

    The hashed text has `key:d0_d1` and `key` for every tensor, and `key|` with its own entries for a nested dict,
    sorted and joined by commas.

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
    """Return a dict key -> shape of the entries of `shapes` whose key starts with `prefix`, which is removed from their
    keys.
    """
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def wrapper_prefixes(keys: Iterable[str]) -> tuple[str, ...]:
    """Return a tuple of the known wrapper prefixes, such as "model.", that at least one of the keys starts with.

    A prefix found here may belong to the component's own names (Qwen3's begin with `model.`): recognition decides.
    """
    keys = list(keys)
    heads = {key.partition(".")[0] for key in keys}
    possible = [prefix for prefix in WRAPPER_PREFIXES if prefix.partition(".")[0] in heads]
    # A file that holds a whole pipeline, as other programs write it, has its text encoders by name.
    several = "text_encoders" in heads
    named = {match[0]: None for key in keys if several and (match := _NAMED_TEXT_ENCODER.match(key))}
    return (*named, *(prefix for prefix in possible if any(key.startswith(prefix) for key in keys)))
