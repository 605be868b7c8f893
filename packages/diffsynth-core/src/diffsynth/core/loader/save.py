"""Writing checkpoints atomically, with the architecture and config in their metadata."""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import json
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.loader import convert
from diffsynth.core.loader.component import apply_rule
from diffsynth.core.loader.dtypes import dtype_names
from diffsynth.core.loader.header import (
    ARCHITECTURE_KEY,
    CONFIG_KEY,
    LAYOUT_KEY,
    SAVE_KEY,
    read_safetensors,
)
from diffsynth.core.loader.layouts import file_shapes, layout_of, rules_of
from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.paths import expanded
from diffsynth.core.replacing import remove_unfinished, replace_files
from diffsynth.errors import CheckpointError, KeyMismatch, did_you_mean, shown
from diffsynth.spec import CheckpointSpec

BASE_KEY = "diffsynth.base"
VERSIONS_KEY = "diffsynth.versions"

SHARD_SIZE = 10 * 10**9
"""Bytes of tensors above which a checkpoint becomes several files."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor to be written: dtype and shape for the header, and the function that computes it while it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def save_checkpoint(
    module: nn.Module,
    path: Path | str,
    *,
    architecture: str,
    config: Any,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    layout: str | CheckpointSpec | None = None,
    base: str = "",
    shard_size: int = SHARD_SIZE,
) -> list[Path]:
    """Write a module as safetensors, architecture and config in its metadata; return a list of the paths of the weight
    files.

    Each file is written under another name, synced to disk and then renamed, the index last: whenever the process ends,
    `path` or its index leads to the old checkpoint or the new one, whole. Above `shard_size` the files are
    `name-00001-of-0000N.safetensors` with `name.safetensors.index.json`; shards that replace others have eight more
    characters in their names. Needs memory for one tensor.

    Args:
        module: the module whose parameters and persistent buffers are written; tensors that share memory are written
            once under each name.
        path: the file; an earlier checkpoint of ours under this name is replaced with its shards.
        architecture: name of the module's `ArchitectureSpec`.
        config: the config dataclass that the module was built from.
        metadata: additional metadata; values must be text.
        dtype: dtype of the floating tensors in the file; None keeps the module's.
        layout: a published layout whose names and shapes the file gets, as a spec or by its declared name, for programs
            that read only that layout; None keeps the module's own names.
        base: signature of the checkpoint that the weights were trained from.
        shard_size: bytes of tensors in one file.

    Returns:
        The files with tensors, in order.

    Raises:
        ValueError: metadata with a key that this function writes, a parameter on meta, a hot LoRA, a dtype that the
            format does not have, or a layout that is unknown or cannot be derived from the module.
        TypeError: `module` is no module, or a `dtype` that is no floating-point dtype.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={shown(module)}: expected a module; tensors are written by save_lora or safetensors")
    path = expanded(path)
    if dtype is not None:
        devices.check_floating(dtype, "dtype", stored=True)
    notes = _notes(metadata or {}, architecture, config, base)
    entries = _entries(module, dtype)
    if layout is not None:
        published = _published(layout, architecture)
        entries = _in_layout(entries, published)
        notes[LAYOUT_KEY] = published.name
    path.parent.mkdir(parents=True, exist_ok=True)
    shards = _shards(entries, shard_size)
    if len(shards) == 1:
        replace_files({path: lambda partial: _write(partial, shards[0], notes)})
        written = [path]
    else:
        written = _save_shards(path, shards, notes)
    _remove_stale(path, written)
    return written


def save_source(
    source: WeightSource,
    path: Path,
    *,
    architecture: str = "",
    config: Any = None,
    metadata: Mapping[str, str] | None = None,
    base: str = "",
) -> None:
    """Write the tensors of a source as one safetensors file, atomically and with one tensor in memory at a time.

    Args:
        source: the tensors; the file gets its keys, shapes and dtypes.
        path: the file, in a folder that exists.
        architecture, config, metadata, base: as for `save_checkpoint`; without an architecture none of ours is written.

    Raises:
        ValueError: as for `save_checkpoint`.
        CorruptFile: a file of the source changed, or cannot be read.
    """
    _check_dtypes(source.dtypes)
    shapes = source.shapes
    entries = {
        key: _Entry(source.dtypes[key], shapes[key], lambda key=key: source.read([key])[key]) for key in source.keys
    }
    notes = _notes(metadata or {}, architecture, config, base) if architecture else {**(metadata or {}), "format": "pt"}
    replace_files({path: lambda partial: _write(partial, entries, notes)})


def _save_shards(path: Path, shards: list[dict[str, _Entry]], notes: dict[str, str]) -> list[Path]:
    # A crash may leave shards of two calls under one index: the id of the call shows that to a reader.
    save_id = uuid.uuid4().hex
    notes = notes | {SAVE_KEY: save_id}
    stem = path.stem
    if _index(path).exists() or any(path.parent.glob(f"{glob.escape(stem)}-*-of-*.safetensors")):
        # The earlier index and its shards stay whole until the new index, the last file, takes its place.
        stem = f"{stem}-{save_id[:8]}"
    names = [path.with_name(f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors") for i in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(entry.size for shard in shards for entry in shard.values())},
        "weight_map": {key: name.name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"

    def writer(shard: dict[str, _Entry]) -> Callable[[Path], None]:
        return lambda partial: _write(partial, shard, notes)

    files = {name: writer(shard) for name, shard in zip(names, shards, strict=True)}
    replace_files(files | {_index(path): lambda partial: _write_bytes(partial, [text.encode()])})
    return names


def _write(path: Path, entries: Mapping[str, _Entry], notes: Mapping[str, str]) -> None:
    # Widest dtypes first, as the format's own library does: then every tensor is aligned to its items.
    order = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    end = 0
    for key in order:
        entry = entries[key]
        header[key] = {
            "dtype": dtype_names()[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size],
        }
        end += entry.size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def contents() -> Any:
        yield len(text).to_bytes(8, "little") + text
        for key in order:
            if entries[key].size:
                yield _bytes(key, entries[key])

    _write_bytes(path, contents())


def _write_bytes(path: Path, contents: Any) -> None:
    with path.open("wb") as stream:
        for part in contents:
            stream.write(part)


def _bytes(key: str, entry: _Entry) -> memoryview:
    made = entry.make().detach().to("cpu", entry.dtype).contiguous()
    assert tuple(made.shape) == entry.shape, f"{key} is {tuple(made.shape)}, announced {entry.shape}"
    return memoryview(made.reshape(-1).view(torch.uint8).numpy())


def _remove_stale(path: Path, written: list[Path]) -> None:
    """Delete safetensors files that earlier calls saved as `path` or as its shards (numbered parts), if not in
    `written`, and their index if one file was written; and what interrupted calls left behind.
    """
    stem = re.escape(path.stem)
    shard = re.compile(rf"{stem}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}\.safetensors")
    earlier = [file for file in path.parent.iterdir() if file == path or shard.fullmatch(file.name)]
    stale = [file for file in earlier if file not in written and _is_ours(file)]
    if stale and written == [path]:
        _index(path).unlink(missing_ok=True)
    for file in stale:
        file.unlink()
    own = rf"{stem}(-[0-9a-f]{{8}})?(-\d{{5}}-of-\d{{5}})?(\.safetensors\.index)?"
    remove_unfinished(path.parent, re.compile(own))


def _is_ours(file: Path) -> bool:
    try:
        return ARCHITECTURE_KEY in read_safetensors(file).metadata
    except CheckpointError:
        return False


def _index(path: Path) -> Path:
    return path.with_name(f"{path.stem}.safetensors.index.json")


def _notes(metadata: Mapping[str, str], architecture: str, config: Any, base: str) -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("diffsynth-core", "torch", "safetensors")}
    own = {
        "format": "pt",
        ARCHITECTURE_KEY: architecture,
        CONFIG_KEY: json.dumps(dataclasses.asdict(config), sort_keys=True),
        VERSIONS_KEY: json.dumps(versions, sort_keys=True),
        **({BASE_KEY: base} if base else {}),
    }
    if taken := [key for key in metadata if key in {*own, BASE_KEY, LAYOUT_KEY, SAVE_KEY}]:
        raise ValueError(f"metadata has {taken[0]!r}, which save_checkpoint writes itself; leave it out")
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f"metadata[{wrong[0]!r}] is {metadata[wrong[0]]!r}; expected text")
    return {**metadata, **own}


def _entries(module: nn.Module, dtype: torch.dtype | None) -> dict[str, _Entry]:
    for name, layer in module.named_modules():
        if beside := getattr(layer, "beside_weights", ""):
            raise ValueError(f"{name} of {type(module).__name__} has {beside}, which no file of weights holds")
    entries: dict[str, _Entry] = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} of {type(module).__name__} is on the meta device: there is nothing to save")
        stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        entries[name] = _Entry(stored, tuple(tensor.shape), lambda tensor=tensor: tensor)
    _check_dtypes({name: entry.dtype for name, entry in entries.items()})
    return entries


def _check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in (known := dtype_names()):
            expected = ", ".join(str(each).removeprefix("torch.") for each in known)
            raise ValueError(f"{name} is {dtype}, which safetensors does not have; expected {expected}")


def _published(layout: str | CheckpointSpec, architecture: str) -> CheckpointSpec:
    if isinstance(layout, str):
        from diffsynth import _discovery

        known = {
            one.name: one
            for one in _discovery.catalog().layouts()[1]
            if one.architecture == architecture and not one.loras_only
        }
        if layout not in known:
            raise ValueError(
                f"layout={layout!r}: {architecture} has the layouts {', '.join(known) or 'none'}"
                f"{did_you_mean(layout, known)}"
            )
        return known[layout]
    if layout.architecture != architecture:
        raise ValueError(f"layout {layout.name} is one of {layout.architecture}, the module is a {architecture}")
    return layout


def _in_layout(entries: Mapping[str, _Entry], checkpoint: CheckpointSpec) -> dict[str, _Entry]:
    own = {key: entry.shape for key, entry in entries.items()}
    rules = rules_of(checkpoint)
    try:
        file = file_shapes(rules, own, layout_of(checkpoint))
        plan = convert.plan(convert.invert(rules, file), own)
    except (ValueError, KeyMismatch) as error:
        raise ValueError(
            f"cannot save in layout {checkpoint.name}: {error}. Leave layout out: the file then has our own names."
        ) from None
    for rule in rules:
        if isinstance(rule, convert.Constant):
            _check_constant(rule, entries, checkpoint)
    made = {}
    for key, target in plan.targets.items():
        sources = [entries[source] for source in target.sources]
        made[key] = _Entry(sources[0].dtype, target.shape, _maker(target, sources))
    return made


def _maker(target: convert.Target, sources: list[_Entry]) -> Callable[[], Tensor]:
    return lambda: apply_rule(target.rule, tuple(source.make() for source in sources), target.index)


def _check_constant(rule: convert.Constant, entries: Mapping[str, _Entry], checkpoint: CheckpointSpec) -> None:
    if not bool((entries[rule.target].make() == rule.value).all()):
        raise ValueError(
            f"cannot save in layout {checkpoint.name}: it leaves out {rule.target}, which is no longer {rule.value}"
        )


def _shards(entries: Mapping[str, _Entry], shard_size: int) -> list[dict[str, _Entry]]:
    """Return a list of dicts key -> `_Entry`, one for each file: the entries in order, at most `shard_size` bytes in a
    file, or one larger tensor.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: expected bytes, at least 1")
    shards: list[dict[str, _Entry]] = [{}]
    size = 0
    for key, entry in entries.items():
        if shards[-1] and size + entry.size > shard_size:
            shards.append({})
            size = 0
        shards[-1][key] = entry
        size += entry.size
    return shards
