"""Notes in a file on how its low-precision weights are stored, and what they mean for reading. No torch.

ComfyUI and the tools around it write a note for each quantised layer: a uint8 tensor `X.comfy_quant` that holds JSON,
or an entry of `layers` in the metadata `_quantization_metadata`. Two weights of equal dtype and shape may mean
different numbers, so a note that is not understood refuses the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from diffsynth.errors import CorruptFile, Unrecognized, did_you_mean, shortened

NOTE = "comfy_quant"
"""Last part of the key of a note."""

METADATA_KEY = "_quantization_metadata"
"""The entry of a file's metadata that holds notes for many layers."""

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
"""Last parts of the keys of a weight's scale."""

MX_BLOCK = 32
"""Elements along the last axis of an MXFP8 weight that share one exponent."""

_NOTE_LIMIT = 65536
"""Bytes of one note; real ones have fewer than 200."""

_FORMATS: Mapping[str, tuple[str, ...]] = {
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e4m3fn_rowwise": ("F8_E4M3",),
    "float8_e4m3fn_blockwise": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "mxfp8": ("F8_E4M3",),
    "int8_tensorwise": ("I8",),
    "int8_rowwise": ("I8",),
    "int8_blockwise": ("I8",),
}
"""Formats that are read -> the dtype of their weights. An fp8 weight may also be stored as the same bits in U8."""

_FIELDS = {
    "format", "convrot", "convrot_groupsize", "group_size", "per_row", "orig_dtype", "orig_shape",
    "full_precision_matrix_mult",
}  # fmt: skip
"""Fields of a note that are known; any other may change what the weights mean."""


class StoredTensor(Protocol):
    """The dtype, shape and place of a tensor in a file, as in `header.TensorInfo`."""

    @property
    def dtype(self) -> str:
        """Name of the dtype in the safetensors format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, row-major."""

    @property
    def start(self) -> int:
        """Offset of the first byte."""

    @property
    def end(self) -> int:
        """Offset behind the last byte."""


@dataclass(frozen=True)
class Encoding:
    """The storage of a weight's numbers, besides its dtype and its scale.

    Args:
        bits: the dtype, by its safetensors name, whose bits a U8 weight holds; empty for a weight stored in its dtype.
        tiled_exponents: whether the scale holds MXFP8 exponents, one byte for each block of 32 elements, in tiles of
            128 x 4.
        rotation: number of neighbouring elements of a row that were multiplied by a Hadamard matrix before they were
            rounded (ConvRot); 0 for none.
    """

    bits: str = ""
    tiled_exponents: bool = False
    rotation: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the weight is its stored numbers, times the scale if there is one."""
        return not (self.bits or self.tiled_exponents or self.rotation)


PLAIN = Encoding()


def of_bytes(name: str, content: bytes) -> dict[str, Any]:
    """Return the note of a layer, a dict, from the bytes of its JSON text; raise CorruptFile if it does not parse.

    Args:
        name: what the bytes are, for the message.
        content: the bytes.

    Raises:
        CorruptFile: the bytes are no JSON object.
    """
    try:
        note = json.loads(content.rstrip(b"\0").decode("utf-8"))
        if not isinstance(note, dict):
            raise ValueError(f"it is a {type(note).__name__}")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CorruptFile(f"{name} does not parse as JSON ({reason}). Fetch the file again.") from None
    return note


def in_metadata(where: str, metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Return a dict layer -> note of the notes in a file's metadata; empty without any.

    Args:
        where: the file's name, for the message.
        metadata: the text entries of its header.

    Raises:
        CorruptFile: the entry is no JSON object, or its `layers` are not notes by layer.
    """
    if METADATA_KEY not in metadata:
        return {}
    layers = of_bytes(f"{where}: {METADATA_KEY}", metadata[METADATA_KEY].encode()).get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(note, dict) for note in layers.values()):
        raise CorruptFile(f"{where}: the layers of {METADATA_KEY} are not notes by layer. Fetch the file again.")
    return layers


def in_stream(where: str, stream: BinaryIO, tensors: Mapping[str, StoredTensor]) -> dict[str, Mapping[str, Any]]:
    """Return a dict layer -> note of the notes among a file's tensors; their bytes are read from `stream`.

    Args:
        where: the file's name, for the message.
        stream: the opened file.
        tensors: key -> place of its tensors.

    Raises:
        CorruptFile: a note is too long, or is no JSON object.
    """
    found = {}
    for key, info in tensors.items():
        layer, _, last = key.rpartition(".")
        if last != NOTE:
            continue
        if info.dtype != "U8" or info.end - info.start > _NOTE_LIMIT:
            raise CorruptFile(
                f"{where}: {key} is {info.dtype} of {info.end - info.start} bytes; expected a note, U8 of at most "
                f"{_NOTE_LIMIT} bytes"
            )
        stream.seek(info.start)
        found[layer] = of_bytes(f"{where}: {key}", stream.read(info.end - info.start))
    return found


def encodings(
    where: str, notes: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, StoredTensor]
) -> dict[str, Encoding]:
    """Return a dict key of a weight -> its `Encoding`, of all weights of a checkpoint that a note describes; raise
    Unrecognized if one is stored in a way that is not read.

    Args:
        where: the files' names, for the message.
        notes: layer -> note, of all files.
        tensors: key -> dtype and shape of their tensors.

    Raises:
        Unrecognized: a note has an unknown format or field, describes no weight or one of another dtype; or a weight or
            a scale needs a note and has none.
    """
    found: dict[str, Encoding] = {}
    for layer, note in notes.items():
        key = f"{layer}.weight"
        if key not in tensors:
            raise Unrecognized(
                f"{where}: a note says how {key} is quantised, and the file has no such tensor"
                f"{did_you_mean(key, tensors)}"
            )
        try:
            found[key] = _encoding(note, tensors[key])
            if not note["format"].startswith("float8") and not any(f"{layer}.{last}" in tensors for last in SCALES):
                raise ValueError(f"its note says {note['format']}, and there is no {SCALES[0]} beside it")
        except ValueError as error:
            raise Unrecognized(
                f"{where}: {key} is quantised in a way that is not read: {error}. Use a file in bf16, or in fp8 "
                f"with scales."
            ) from None
    _check_unnoted(where, tensors, found)
    return found


def _encoding(note: Mapping[str, Any], info: StoredTensor) -> Encoding:
    """Return the `Encoding` of a weight with this note.

    Raises:
        ValueError: it is not one that is read; the message says why.
    """
    name = note.get("format")
    if not isinstance(name, str) or name not in _FORMATS:
        raise ValueError(f"its format is {name!r:.100}; read are {', '.join(_FORMATS)}")
    if unknown := sorted(set(note) - _FIELDS):
        raise ValueError(f"its note on {name} has {shortened(unknown, 3)!r:.200}, which may change what it means")
    (dtype,) = _FORMATS[name]
    as_bits = dtype != "I8" and info.dtype == "U8"
    if info.dtype != dtype and not as_bits:
        raise ValueError(f"its note says {name}, and it is {info.dtype}; expected {dtype}")
    if name == "mxfp8" and note.get("group_size", MX_BLOCK) != MX_BLOCK:
        raise ValueError(f"its note says mxfp8 with blocks of {note['group_size']!r:.100}; expected {MX_BLOCK}")
    return Encoding(
        bits=dtype if as_bits else "",
        tiled_exponents=name == "mxfp8",
        rotation=_rotation(note, info.shape),
    )


def _rotation(note: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    if note.get("convrot", False) is False:
        return 0
    size = note.get("convrot_groupsize", 256)
    if note["convrot"] is not True or type(size) is not int or size not in {4**power for power in range(1, 7)}:
        raise ValueError(
            f"its note says convrot={note['convrot']!r:.50} with groups of {size!r:.50}; expected a power of 4 from 4 "
            f"to 4096"
        )
    if len(shape) != 2 or shape[1] % size:
        raise ValueError(f"its rows were rotated in groups of {size}, which do not divide its shape {shape}")
    return size


def _check_unnoted(where: str, tensors: Mapping[str, StoredTensor], noted: Mapping[str, Encoding]) -> None:
    """Raise Unrecognized if a weight without a note is one that only a note can explain."""
    for key, info in tensors.items():
        layer, _, last = key.rpartition(".")
        weight = tensors.get(f"{layer}.weight") if last in SCALES else None
        if weight is None or f"{layer}.weight" in noted:
            continue
        if weight.dtype == "U8":
            what = f"{layer}.weight is U8 with a scale, which may be fp8 bits or packed numbers"
        elif info.dtype == "U8" or (info.dtype == "F8_E8M0" and _is_mx(weight.shape, info.shape)):
            what = f"{key} is {info.dtype}, exponents whose order in the file may be that of MXFP8"
        else:
            continue
        raise Unrecognized(
            f"{where}: {what}, and no note ({layer}.{NOTE}, {METADATA_KEY}) says which. Use a file in bf16, or "
            f"in fp8 with scales."
        )


def _is_mx(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return len(weight) == len(scale) == 2 and scale[0] >= weight[0] and scale[1] * MX_BLOCK >= weight[1]
