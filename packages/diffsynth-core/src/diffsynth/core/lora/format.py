"""LoRA files: reading the key names of all usual programs, and writing those that peft, diffusers and ComfyUI read.

`lora_keys` sorts the keys, `strength` finds the alphas, and `changes` has the arithmetic. A key that cannot be read is
an error that names it: leaving it out would change the result without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth.core.finite import nonfinite
from diffsynth.core.loader import convert, pickled
from diffsynth.core.loader.files import WEIGHT_SUFFIXES, only_checkpoint
from diffsynth.core.loader.header import TensorInfo, read_safetensors
from diffsynth.core.loader.lora_keys import (
    DIFFERENCE,
    LOW_RANK,
    MAX_MODULES,
    REPLACEMENT,
    UNKNOWN,
    Change,
    lora_keys,
)
from diffsynth.core.loader.reader.source import ComponentSource, stored_dtype
from diffsynth.core.loader.save import save_source
from diffsynth.core.loader.state_dict import load_metadata_from_safetensors, load_state_dict
from diffsynth.core.lora.call_defaults import call_defaults_metadata, read_call_defaults
from diffsynth.core.lora.changes import Factors, LoRALayer, ParameterChange, factors_of, single
from diffsynth.core.lora.strength import Strengths, read_adapter_config, strengths_of
from diffsynth.core.paths import expanded
from diffsynth.errors import CorruptFile, KeyMismatch, shortened

PREFIX = "diffusion_model."
"""The prefix of a network's names in LoRA files, which ComfyUI and diffusers both look for."""


@dataclass(frozen=True, eq=False)
class LoRA:
    """The changes that one LoRA makes.

    Args:
        layers: name of a linear layer -> low-rank change of its weight.
        where: the file's name, for messages.
        others: name of a parameter, `"blocks.0.norm.weight"`, -> its change of any other kind.
        left: name -> why it is not in `layers` or `others`; empty unless reading was not strict.
        call_defaults: argument -> default of a call while it is loaded, if its file says so.
    """

    layers: Mapping[str, LoRALayer]
    where: str = "the given state_dict"
    others: Mapping[str, ParameterChange] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    call_defaults: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def factors(self) -> tuple[Factors, ...]:
        """All changes, a tuple of `Factors`, those of linear layers first."""
        own = (factors_of(layer, name) for name, layer in self.layers.items())
        return (*own, *(factors for change in self.others.values() for factors in change.factors))


def read_lora(source: str | Path | Sequence[Path] | Mapping[str, Tensor], *, strict: bool = True) -> LoRA:
    """Return the `LoRA` of a file, of a folder, of several files or of a state dict, with the module names found there
    (`fit` translates them).

    The strength of a layer is that of its own alpha, else that of the file's metadata or of an `adapter_config.json`
    beside the file; see `strength`.

    Args:
        source: a file, a folder with one LoRA, the files of one LoRA, or a state dict.
        strict: False leaves out what cannot be read and lists it in `left`.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or a tensor holds NaN or infinity.
        KeyMismatch: the file is no LoRA, or, if strict, some of it cannot be read; see `parse`.
    """
    if isinstance(source, Mapping):
        return parse(source, strict=strict)
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(each) for each in source]
    paths = [file for path in paths for file in (_files_in(path) if path.is_dir() else [path])]
    metadata = load_metadata_from_safetensors([path for path in paths if path.suffix == ".safetensors"])
    config = read_adapter_config(paths[0]) if paths else None
    where = ", ".join(map(str, paths))
    for path in paths:
        if path.suffix == ".safetensors":
            _reject_too_many(read_safetensors(path).tensors, where)
    return parse(load_state_dict(paths), where, metadata=metadata, config=config, strict=strict)


def _reject_too_many(tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Raise KeyMismatch if a file has more changes than are read; none of its tensors is read before."""
    if len(tensors) > MAX_MODULES:
        found = lora_keys({key: info.shape for key, info in tensors.items()})
        if found.too_many:
            raise KeyMismatch(f"{where} {found.too_many}")


def _files_in(folder: Path) -> list[Path]:
    for name in ("adapter_model", "pytorch_lora_weights"):
        if found := [
            folder / f"{name}{suffix}" for suffix in WEIGHT_SUFFIXES if (folder / f"{name}{suffix}").is_file()
        ]:
            return found[:1]
    return only_checkpoint(folder)


def save_lora(
    lora: LoRA | Mapping[str, Tensor],
    path: Path | str,
    *,
    prefix: str = PREFIX,
    metadata: Mapping[str, str] | None = None,
    call_defaults: Mapping[str, Any] | None = None,
) -> Path:
    """Write `lora` as a safetensors file to `path`, replacing an existing one, and return the file's `Path`.

    Its keys are `lora_A`, `lora_B` and, for layers that have one, `alpha`. The file is written atomically. Reading it
    gives the same bits.

    Args:
        lora: a LoRA with a network's own names, or a state dict in any known key names.
        path: the file; an existing one is replaced.
        prefix: put before each name that does not start with it. peft reads `"base_model.model."`, and text encoders
            have `"text_encoder."`.
        metadata: additional metadata; values must be text.
        call_defaults: argument -> default of calls while the LoRA is loaded, such as `{"num_inference_steps": 4}` for
            one that is distilled to four steps; None keeps those of the LoRA.

    Returns:
        The file.

    Raises:
        ValueError: metadata that is not text, call defaults that JSON does not have, or a dtype that the format does
            not have.
        KeyMismatch: a state dict that is not a plain LoRA.
    """
    made = lora if isinstance(lora, LoRA) else parse(lora)
    require_plain(made)
    asked = call_defaults_metadata(made.call_defaults if call_defaults is None else call_defaults)
    made = LoRA({name.removeprefix(prefix): layer for name, layer in made.layers.items()})
    return write_keys(to_state_dict(made, prefix), path, {**asked, **(metadata or {})})


def write_keys(state_dict: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors under their keys as a safetensors file, atomically, and return the file's `Path`.

    Args:
        state_dict: key -> tensor.
        path: the file; an existing one is replaced.
        metadata: additional metadata; values must be text.

    Raises:
        ValueError: metadata that is not text, or a dtype that the format does not have.
    """
    tensors = pickled.of_state_dict(state_dict)
    targets = convert.plan((), tensors.shapes).targets
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if wrong := [key for key, value in (metadata or {}).items() if not isinstance(value, str)]:
        raise ValueError(f"metadata[{wrong[0]!r}] is {(metadata or {})[wrong[0]]!r}; expected text")
    dtypes = {key: stored_dtype(tensors, key) for key in targets}
    save_source(ComponentSource(tensors, targets, dtypes), path, metadata=metadata)
    return path


def subset(lora: LoRA, names: Container[str]) -> LoRA:
    """Return a `LoRA` with those changes of `lora` whose name in the file (`Change.name`) is in `names`."""
    others = {
        key: change for key, change in lora.others.items() if all(each.change.name in names for each in change.factors)
    }
    return replace(lora, layers={key: layer for key, layer in lora.layers.items() if key in names}, others=others)


def require_plain(lora: LoRA) -> None:
    """Raise KeyMismatch unless every change of `lora` is a low-rank change of a linear layer.

    Raises:
        KeyMismatch: it has changes of another kind.
    """
    if lora.others:
        kinds = sorted({change.kind for change in lora.others.values()})
        raise KeyMismatch(
            f"{lora.where} changes {shortened(lora.others, 4)} by {', '.join(kinds)}; expected a plain LoRA, two "
            "matrices for each linear layer"
        )


def to_state_dict(lora: LoRA, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict (key -> tensor) of `lora` with `prefix` before each module name:
    `"blocks.0.to_q.lora_A.weight"`, `...lora_B.weight` and, if the layer has one, `...alpha`.

    Args:
        prefix: put before every module name.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.up
        if layer.alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def parse(
    state_dict: Mapping[str, Any],
    where: str = "the given state_dict",
    *,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> LoRA:
    """Return the `LoRA` that `state_dict` holds, in the key names of any usual program.

    Args:
        state_dict: key -> tensor; dicts around it, such as `"state_dict"`, are removed. An alpha may be a number.
        where: the file's name, for messages.
        metadata: text entries of the file, which may hold alpha and rank.
        config: contents of the file's `adapter_config.json`.
        strict: False leaves out what cannot be read and lists it in `left`.

    Raises:
        KeyMismatch: no key is a LoRA's; more than 20,000 modules; a value that is no floating number; the metadata
            does not parse; or, if strict, a matrix is missing, two do not go together, or keys are no part
            of a LoRA.
        CorruptFile: a value is NaN or infinity.
        TypeError: a value that is no tensor.
    """
    tensors = _tensors(state_dict)
    found = lora_keys({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if found.too_many:
        raise KeyMismatch(f"{where} {found.too_many}")
    if not found.certain and set(found.others.values()) <= {UNKNOWN}:
        shown = f", such as {next(iter(tensors))}" if tensors else ""
        raise KeyMismatch(
            f"{where} holds no LoRA: none of its {len(tensors)} keys is a lora_A, lora_B, lora_down or lora_up"
            f"{shown}. A checkpoint is loaded with model_configs"
        )
    if (found.broken or found.others) and (strict or not found.changes or "" in found.broken):
        raise KeyMismatch(
            f"{where} has {len(found.broken) + len(found.others)} layers or keys that cannot be applied, so no layer "
            f"was changed: {found.complaint()}. Use another file, or strict=False, which leaves them out"
        )
    _check_finite(tensors, where)
    strengths = strengths_of(where, metadata or {}, config)
    layers: dict[str, LoRALayer] = {}
    others: dict[str, ParameterChange] = {}
    for change in found.changes:
        read = _read(change, tensors, strengths, where)
        if isinstance(read, LoRALayer):
            layers[change.module] = read
        else:
            name = f"{change.module}.{change.part}"
            earlier = others[name].parts if name in others else ()
            others[name] = ParameterChange((*earlier, *single(read).parts))
    strengths.log_differences()
    call_defaults = read_call_defaults(metadata or {}, where)
    return LoRA(layers, where, others, {**found.broken, **found.others}, call_defaults)


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the flat dict key -> tensor of a state dict, without a dict around the LoRA's own."""
    state_dict = pickled.without_wrappers(state_dict)
    for key, value in state_dict.items():
        if not isinstance(value, Tensor | Mapping) and not pickled.is_alpha(key, value):
            raise TypeError(f"state_dict[{key!r}] is a {type(value).__name__}; expected a tensor")
    return dict(pickled.of_state_dict(state_dict).tensors_in_memory or {})


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    wrong = nonfinite(tensors, whole=True)
    if wrong:
        raise CorruptFile(
            f"{where}: {len(wrong)} of {len(tensors)} tensors hold NaN or infinity: {shortened(wrong, 3)}. The "
            f"training that wrote the LoRA diverged: use an earlier checkpoint of it."
        )


def _read(change: Change, tensors: Mapping[str, Tensor], strengths: Strengths, where: str) -> LoRALayer | Factors:
    """Return the tensors of a change with its factor: a `LoRALayer` if they are two matrices and nothing else.

    Raises:
        KeyMismatch: a value that is no floating number, or a DoRA without magnitudes.
    """
    found = {slot: _checked(key, tensors[key], slot, where) for slot, key in change.keys.items()}
    own = found.pop("alpha", None)
    alpha = None if own is None else float(own)
    if change.kind in (DIFFERENCE, REPLACEMENT) and not change.rank:
        return Factors(change, found)
    declared = strengths.of(change.module)
    if declared is not None and declared.dora and change.kind == LOW_RANK and not change.is_dora:
        raise KeyMismatch(f"{declared.source} says use_dora, but {change.module} has no magnitudes")
    if alpha is None:
        scale = strengths.scale(change.module, change.rank)
    else:
        scale = alpha / change.rank if change.rank else 1.0
    if change.kind == LOW_RANK and len(change.shape) == 2 and found.keys() == {"down", "up"}:
        if alpha is None and scale is not None:
            alpha = scale * change.rank
        return LoRALayer(found["down"].flatten(1), found["up"].flatten(1), alpha)
    return Factors(change, found, 1.0 if scale is None else scale)


def _checked(key: str, tensor: Tensor, slot: str, where: str) -> Tensor:
    if not tensor.is_floating_point() and slot != "alpha":
        raise KeyMismatch(
            f"{where}: {key} is stored as {tensor.dtype}; expected floating numbers. Quantised LoRAs are not read"
        )
    return tensor
