"""A training run's settings: a TOML file read into frozen dataclasses, where every key must be known."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffsynth.errors import TrainingError, did_you_mean

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class ComponentRecipe:
    """A module of the pipeline: read from a file, or built from a config and drawn at random.

    Args:
        source: path or source string of a checkpoint; excludes `architecture`, `config` and `init`.
        architecture: name of a registered architecture, to start from scratch.
        config: fields of its config that differ from their defaults.
        init: reference to `f(module)` that draws the first weights; empty keeps what the constructor drew.
        train: whether it learns.
        freeze: name patterns of parameters that do not learn although the component does (`"encoder.*"`).
        compile: compile the blocks that the architecture names as repeated.
        channels_last: keep convolutions with their channels innermost, which suits bf16 and tensor cores.
    """

    source: str = ""
    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""
    train: bool = False
    freeze: tuple[str, ...] = ()
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if bool(self.source) == bool(self.architecture):
            raise TrainingError("a component needs either source (a file) or architecture (from scratch)")
        if self.source and (self.config or self.init):
            raise TrainingError(f"source = {self.source!r} brings its own config and weights; drop config and init")


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe:
    """How captions vary from step to step.

    Args:
        templates: drawn uniformly; `{caption}` is the manifest's text, `{article}` is "a" or "an".
        drop: share of captions replaced by the empty prompt, for classifier-free guidance (arXiv:2207.12598).
    """

    templates: tuple[str, ...] = ("{caption}",)
    drop: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Where samples come from.

    Args:
        manifest: a .csv, .json or .jsonl file; paths in it are relative to its folder.
        height: pixels; with `width`, images are scaled to cover this size and cropped about their centre.
        width: pixels.
        captions: how prompts vary.
        cache: folder for the results of units that do not learn.
        repeat: rows are visited this often in an epoch.
    """

    manifest: str
    height: int
    width: int
    captions: CaptionRecipe = field(default_factory=CaptionRecipe)
    cache: str = ""
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """How fp32 weights follow their gradients.

    Args:
        name: "adamw", or "muon": matrices and convolutions by Muon, embeddings and vectors by AdamW, at one rate.
        learning_rate: the highest.
        betas: decay of the moments.
        weight_decay: on matrices and convolutions; vectors have none.
        clip: largest norm of the gradient; 0 is none.
        schedule: after the warm-up: "constant", "cosine" to 0, or "trapezoid", flat and then linear to 0.
        warmup_steps: linear rise from 0.
        decay_steps: length of the trapezoid's fall.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["constant", "cosine", "trapezoid"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class LoopRecipe:
    """How long, how much at a time, and in what precision.

    Args:
        steps: optimizer steps.
        batch_size: samples in a step, over all processes.
        micro_batch: samples in one forward pass; 0 is the whole batch of a process.
        precision: "bf16" runs forward passes under autocast; weights stay fp32 either way.
        gradient_checkpointing: recompute activations in the backward pass.
        save_every: steps between checkpoints; 0 saves only at the end.
        log_every: steps between rows of `loss.csv`, which hold the means since the last row.
        keep: checkpoints that stay.
    """

    steps: int
    batch_size: int = 1
    micro_batch: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    save_every: int = 0
    log_every: int = 10
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class EmaRecipe:
    """Running mean of the weights, which is what the run ships.

    Args:
        decay: share of the mean kept at each step; 0 is off. It rises from 0.1 as `(1 + step) / (10 + step)`.
    """

    decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OutputRecipe:
    """What is written where.

    Args:
        folder: of checkpoints, logs and the final weights.
        dtype: of the weights' matrices on disk.
    """

    folder: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of a run.

    Args:
        pipeline: reference to the pipeline class, or the name of a registered model whose pipeline it is.
        objective: `name` of a registered objective; the other keys are its options.
        components: role -> where its module comes from. Roles left out stay empty.
        processors: role -> folder of a tokenizer or processor.
        seed: of weights, order, captions and noise.
    """

    pipeline: str
    objective: Mapping[str, Any]
    components: Mapping[str, ComponentRecipe]
    data: DataRecipe
    loop: LoopRecipe
    output: OutputRecipe
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    processors: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


def read_recipe(path: Path, *, changes: Iterable[str] = ()) -> Recipe:
    """A recipe from its file.

    Args:
        path: of the TOML file.
        changes: `"section.key=value"`, the value as TOML or, where it is none, as text.

    Raises:
        TrainingError: no such file, not TOML, an unknown or missing key, a value of another type; the message names
            the section and the nearest spelling.
    """
    if not path.is_file():
        raise TrainingError(f"recipe {path} does not exist")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"recipe {path} is not TOML: {error}") from error
    for change in changes:
        _change(content, change)
    return parse_section(Recipe, content, where="")


def parse_section(section: type[Section], content: Mapping[str, Any], *, where: str) -> Section:
    """A dataclass from a table, nested ones included.

    Raises:
        TrainingError: see `read_recipe`.
    """
    at = f"[{where}]" if where else "the recipe's top level"
    hints = typing.get_type_hints(section)
    fields = {each.name: each for each in dataclasses.fields(section)}  # type: ignore[arg-type]
    for key in content:
        if key not in fields:
            raise TrainingError(f"unknown key {key!r} in {at}{did_you_mean(key, fields)} Known: {', '.join(fields)}")
    for name, each in fields.items():
        if name not in content and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise TrainingError(f"{at} lacks {name!r}")
    values = {key: _parse(hints[key], value, f"{where}.{key}" if where else key) for key, value in content.items()}
    try:
        return section(**values)
    except TrainingError as error:
        raise TrainingError(f"{at}: {error}") from error


def _change(content: dict[str, Any], change: str) -> None:
    keys, equals, text = change.partition("=")
    if not equals:
        raise TrainingError(f"{change!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = keys.strip().split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[key] = value


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return parse_section(typing.cast(type, hint), value, where=where)
    if origin is Literal:
        if value not in parts:
            raise TrainingError(f"{where} = {value!r}: expected one of {', '.join(map(repr, parts))}")
        return value
    if origin is tuple and isinstance(value, list):
        several = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(several) != len(value):
            raise TrainingError(f"{where} has {len(value)} entries; expected {len(several)}")
        return tuple(_parse(part, item, where) for part, item in zip(several, value, strict=True))
    if origin in (Mapping, typing.get_origin(Mapping[str, Any])) and isinstance(value, Mapping):
        return {key: _parse(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)
    if origin is not None or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TrainingError(
            f"{where} = {value!r}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}"
        )
    return value
