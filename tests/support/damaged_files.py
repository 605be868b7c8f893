"""Checkpoint files that are damaged or hostile, made in code, and what reading each of them leads to.

`CORPUS` holds the kinds that once hung, ended in another library's error or took all memory. `edits` draws further
files: a valid one with a few changes to keys, shapes, dtypes, offsets, metadata and notes.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from diffsynth import _discovery
from diffsynth.core.loader import component, recognize
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.errors import CheckpointError
from diffsynth.spec import resolve

SECONDS = 10.0
"""Longest time of the processor that any of these small files may take; on a quiet core the slowest takes a half."""

ARCHITECTURE = "z_image_dit"

Entry = dict[str, Any]


@cache
def valid() -> tuple[dict[str, Entry], bytes]:
    """Return the header's entries and the data of a whole checkpoint of a tiny network."""
    spec = _discovery.catalog().layouts()[0][ARCHITECTURE]
    module = component.build(spec, resolve(spec.tiny))
    entries: dict[str, Entry] = {}
    end = 0
    for key, tensor in module.state_dict().items():
        size = tensor.numel() * 2
        entries[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    return entries, torch.full((end // 2,), 0.01, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


def file_bytes(entries: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """Return the bytes of a safetensors file with these entries, or this text, as its header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def load(path: Path) -> None:
    """Read a checkpoint, recognise it and load its components."""
    tensors = read_files([path])
    for found in recognize.recognize(tensors, *_discovery.catalog().layouts()):
        component.load_component(found, tensors, device="cpu", dtype=torch.float32)


def outcome(path: Path) -> tuple[str, str]:
    """Read a file as far as it can be, and return (verdict, message of the error): "clear" for an error of ours that
    names the file, "accepted" for a file that loads, and else what is wrong.
    """
    started, message = time.process_time(), ""
    try:
        load(path)
        result = "accepted"
    except CheckpointError as error:
        message = str(error)
        result = "clear" if path.name in message else f"an error that does not name the file: {message:.300}"
        if "\x1b" in message:
            result = "an error with control characters"
    except Exception as error:
        result = f"{type(error).__name__}: {error!s:.300}"
    seconds = time.process_time() - started
    return (result if seconds < SECONDS else f"{seconds:.0f} s, then {result}"), message


def _changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    entries, data = valid()
    entries = json.loads(json.dumps(entries))
    change(entries)
    return file_bytes(entries, data)


def _with_metadata(config: str, architecture: str = ARCHITECTURE) -> bytes:
    metadata = {"diffsynth.architecture": architecture, "diffsynth.config": config}
    return _changed(lambda entries: entries.update(__metadata__=metadata))


def _empty(key: str) -> dict[str, Any]:
    return {key: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _self_containing(key: str) -> bytes:
    value: dict[str, Any] = {} if key == "state_dict" else {"w": torch.zeros(1)}
    value[key] = value
    return _pickled(value)


def _doubling(depth: int) -> bytes:
    value: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(depth):
        value = {"a": value, "b": value}
    return _pickled(value)


def _nested(depth: int) -> bytes:
    value: Any = {"w": torch.zeros(1)}
    for _ in range(depth):
        value = {"a": value}
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
    except RecursionError:  # torch pickles recursively: write the bytes of the pickle itself
        return _archive(b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"}" + b"s" * depth + b".")
    return stream.getvalue()


def _archive(pickle: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", b"3\n")
    return stream.getvalue()


def _many(count: int) -> bytes:
    return file_bytes(("{" + ",".join(f'"layers.{i}.x":{_ENTRY}' for i in range(count)) + "}").encode())


_ENTRY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'

CORPUS: Mapping[str, tuple[str, Callable[[], bytes], str]] = {
    "a huge block number": (
        ".safetensors",
        lambda: _changed(lambda e: e.update(_empty("layers.10000000000.attention.to_q.weight"))),
        "it lacks layers.|it has . items of layers",
    ),
    "a gap in the blocks": (
        ".safetensors",
        lambda: _changed(lambda e: e.update(_empty("layers.4000.attention.to_q.weight"))),
        "it lacks layers.|it has . items of layers",
    ),
    "a key of many twice": (
        ".safetensors",
        lambda: file_bytes(("{" + "".join(f'"k{i}":0,' for i in range(60000)) + '"k59999":0}').encode()),
        "it has 'k59999' twice",
    ),
    "more tensors than the limit": (".safetensors", lambda: _many(100_001), "has 100001 tensors, and the limit"),
    "far more tensors than the limit": (
        ".safetensors",
        lambda: file_bytes(("{" + ",".join(f'"k{i}":0' for i in range(1_500_000)) + "}").encode()),
        "more than 100000 tensors, the limit",
    ),
    "many tensors": (".safetensors", lambda: _many(99_000), "no installed architecture|nearest is|limit"),
    "a shape of 100,000 axes": (
        ".safetensors",
        lambda: file_bytes({"a": {"dtype": "F32", "shape": [2**62] * 100_000, "data_offsets": [0, 8]}}),
        "has 100000 axes",
    ),
    "a billion layers in the metadata": (
        ".safetensors",
        lambda: _with_metadata('{"dim":256,"n_heads":4,"n_kv_heads":4,"axes_dims":[16,24,24],"n_layers":1000000000}'),
        "more than [0-9]+ parameters",
    ),
    "no heads in the metadata": (".safetensors", lambda: _with_metadata('{"dim":256,"n_heads":0}'), "does not fit"),
    "negative sizes in the metadata": (".safetensors", lambda: _with_metadata('{"dim":-256}'), "config"),
    "absurd sizes in the metadata": (
        ".safetensors",
        lambda: _with_metadata('{"dim":4611686018427387904,"n_heads":4,"n_kv_heads":4}'),
        "config",
    ),
    "text for a size": (".safetensors", lambda: _with_metadata('{"dim":"x"}'), "config"),
    "a config nested without end": (".safetensors", lambda: _with_metadata('{"dim":' + "[" * 10**5), "does not fit"),
    "an architecture of another file": (
        ".safetensors",
        lambda: file_bytes(
            {
                "__metadata__": {"diffsynth.architecture": ARCHITECTURE, "diffsynth.config": "{}"},
                **_empty("a"),
            }
        ),
        "metadata says that it is a z_image_dit, but it lacks",
    ),
    "tensors without elements": (
        ".safetensors",
        lambda: _changed(
            lambda e: [each.update(shape=[0] * len(each["shape"]), data_offsets=[0, 0]) for each in e.values()]
        ),
        "",
    ),
    "integers for floats": (
        ".safetensors",
        lambda: _changed(lambda e: [each.update(dtype="I16") for each in e.values()]),
        "without a scale or a note",
    ),
    "control characters in a key": (
        ".safetensors",
        lambda: file_bytes(_empty("\x1b]0;owned\x07x")),
        r"\\x1b",
    ),
    "a pickle whose only key holds it": (".pt", lambda: _self_containing("state_dict"), "one that holds itself"),
    "a pickle that holds itself": (".pt", lambda: _self_containing("s"), "one that holds itself"),
    "a pickle that doubles at each level": (".pt", lambda: _doubling(25), "tensors, and the limit is"),
    "a pickle nested 100 deep": (".pt", lambda: _nested(100), "nested more than 32 deep"),
    "a pickle nested 5,000 deep": (".pt", lambda: _nested(5000), "nested|recursion|tensors alone"),
    "a tensor of terabytes by a stride of 0": (
        ".pt",
        lambda: _pickled({"w": torch.zeros(1).expand(2**40)}),
        "repeated by strides",
    ),
    "a compressed pickle": (
        ".pt",
        lambda: _archive(b"\x80\x02" + b"0" * 10**7, zipfile.ZIP_DEFLATED),
        "compressed archive",
    ),
    "a note that is no JSON": (
        ".safetensors",
        lambda: file_bytes({"__metadata__": {"_quantization_metadata": "[" * 10**5}}),
        "does not parse as JSON",
    ),
}
"""Name -> suffix, function that returns the bytes, and what the error must say ("" if it may load)."""


_NAMES = st.sampled_from([
    "layers.10000000000.x", "layers.-1.x", "layers..x", "", ".", "x" * 5000, "\u202e", "layers.0.attention.to_q",
    "model.diffusion_model.layers.0.x", "layers.0.attention.to_q.weight_scale", "layers.0.attention.to_q.comfy_quant",
    "scaled_fp8", "lora_unet_x.alpha", "layers.99999999999999999999999.attention.to_q.weight",
])  # fmt: skip
_SIZES = st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**62, 2**63, 1.5, None, "4", True])
_DTYPES = st.sampled_from(["F32", "BF16", "F16", "I8", "U8", "F8_E4M3", "C64", "BOOL", "F4", "x", None, 3])
_VALUES = st.one_of(
    _SIZES, st.lists(_SIZES, max_size=4), st.just({}), st.floats(allow_nan=False), st.text(max_size=5), st.just(10**9)
)
_CONFIG_FIELDS = st.sampled_from(
    ["dim", "n_heads", "n_layers", "n_kv_heads", "axes_dims", "patch_size", "x", "in_channels"]
)


@st.composite
def edits(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a checkpoint with up to four changes to its header, and at times to its bytes."""
    entries, data = valid()
    entries = json.loads(json.dumps(entries))
    for _ in range(draw(st.integers(1, 4))):
        keys = sorted(entries)
        key = draw(st.sampled_from(keys))
        kind = draw(st.integers(0, 8))
        if kind == 0:
            del entries[key]
        elif kind == 1:
            entries[draw(_NAMES)] = entries[key]
        elif kind == 2:
            entries[key]["shape"] = draw(st.lists(_SIZES, max_size=5))
        elif kind == 3:
            entries[key]["dtype"] = draw(_DTYPES)
        elif kind == 4:
            entries[key]["data_offsets"] = draw(st.lists(_SIZES, max_size=3))
        elif kind == 5:
            number = draw(st.sampled_from(["7", "4000", "123456789012"]))
            entries[key.replace(".0.", f".{number}.")] = entries.pop(key)
        elif kind == 6:
            scale = {"dtype": "F32", "shape": [0], "data_offsets": entries[key]["data_offsets"][:1] * 2}
            entries[f"{key.removesuffix('weight')}weight_scale"] = scale
        elif kind == 7:
            prefix = draw(st.sampled_from(["model.", "vae.", "x."]))
            entries = {f"{prefix}{name}": each for name, each in entries.items()}
        else:
            entries[key] = draw(_VALUES)
            break
    if draw(st.booleans()):
        config = draw(st.dictionaries(_CONFIG_FIELDS, _VALUES, max_size=3))
        name = draw(st.sampled_from([ARCHITECTURE, "x", "flux_autoencoder"]))
        entries["__metadata__"] = {"diffsynth.architecture": name, "diffsynth.config": json.dumps(config)}
    made = file_bytes(entries, data)
    cut = draw(st.one_of(st.just(len(made)), st.integers(0, len(made))))
    return made[:cut]
