"""Settings of a training run: a TOML file read into frozen dataclasses. Unknown keys raise."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffsynth.core.paths import expanded
from diffsynth.errors import TrainingError, did_you_mean, shown

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class ComponentRecipe:
    """A component of the pipeline, loaded from a file or built from a config with random weights.

    Args:
        source: path or source string of a checkpoint; excludes `architecture`, `config` and `init`.
        architecture: name of a registered architecture, to train from scratch.
        config: config fields that differ from the defaults of the architecture's config.
        init: reference to `f(module)` that initialises the weights; empty keeps those of the constructor.
        train: whether the component is trained.
        freeze: name patterns of parameters of a trained component that are not trained (`"encoder.*"`).
        compile: compile the blocks that the architecture declares, one by one; without any, the whole component.
        channels_last: use the memory format `torch.channels_last`, which is faster in bf16 and on tensor cores.
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
            raise TrainingError(f"source = {self.source!r} determines config and weights; remove config and init")


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe:
    """Random variation of captions from step to step.

    Args:
        templates: one is chosen uniformly; `{caption}` is the manifest's text, `{article}` is "a" or "an".
        drop: probability in [0, 1) of the empty prompt, for classifier-free guidance (arXiv:2207.12598).
    """

    templates: tuple[str, ...] = ("{caption}",)
    drop: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The dataset.

    Args:
        manifest: path of a .csv, .json or .jsonl file; paths in it are relative to its folder.
        height: image height in pixels; images are scaled to cover height x width and center-cropped.
        width: image width in pixels.
        background: colour below transparent pixels, a name or "#rrggbb".
        captions: variation of captions.
        cache: folder for the results of units that are not trained; empty keeps them in memory.
    """

    manifest: str
    height: int
    width: int
    background: str = "white"
    captions: CaptionRecipe = field(default_factory=CaptionRecipe)
    cache: str = ""

    def __post_init__(self) -> None:
        _check_ranges(self, height=(1, None), width=(1, None))
        _expand(self, "manifest", "cache")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """The optimizer of the fp32 weights.

    Args:
        name: "adamw", or "muon": matrices and convolutions by Muon, embeddings and vectors by AdamW, at one rate.
        learning_rate: maximum learning rate.
        betas: decay rates of the moments.
        weight_decay: decay of matrices and convolutions; vectors are not decayed.
        clip: maximum norm of the gradient; 0 disables clipping.
        schedule: after the warm-up: "constant", "cosine" to 0, or "trapezoid", constant and then linear to 0.
        warmup_steps: steps of linear increase from 0.
        decay_steps: steps of linear decrease of the trapezoid, which begins after the warm-up.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["constant", "cosine", "trapezoid"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        _check_ranges(
            self, **dict.fromkeys(("learning_rate", "weight_decay", "clip", "warmup_steps", "decay_steps"), (0, None))
        )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"betas = {list(self.betas)}: expected numbers in [0, 1)")
        if self.decay_steps and self.schedule != "trapezoid":
            raise TrainingError(
                f"decay_steps = {self.decay_steps} is for schedule = 'trapezoid', and schedule is {self.schedule!r}; "
                "leave it out"
            )
        if self.schedule == "trapezoid" and not self.decay_steps:
            raise TrainingError("schedule = 'trapezoid' needs decay_steps; without a decay it is 'constant'")

    def misfit(self, steps: int) -> str:
        """Return a text that says that warm-up and decay are longer than a training of `steps` steps, so that the
        maximum learning rate is not reached or the decay does not take place; "" if they fit.
        """
        least = self.warmup_steps + (self.decay_steps if self.schedule == "trapezoid" else 0)
        if least <= steps and not (self.schedule == "cosine" and 0 < steps <= self.warmup_steps):
            return ""
        decay = f", decay_steps = {self.decay_steps}" if self.decay_steps else ""
        return (
            f"warmup_steps = {self.warmup_steps}{decay} (schedule = {self.schedule!r}) do not fit into loop.steps = "
            f"{steps}: the learning rate does not follow the schedule. Shorten them, or train longer"
        )


@dataclass(frozen=True, kw_only=True)
class LoopRecipe:
    """Number of steps, batch size and precision.

    Args:
        steps: number of optimizer steps.
        batch_size: samples per step, over all processes.
        micro_batch: samples per forward pass; 0 for the whole batch of a process.
        precision: "bf16" runs forward passes under autocast; weights are fp32 in both cases.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        save_every: steps between checkpoints; 0 saves at the end only.
        log_every: steps between rows of `loss.csv`, which hold means since the last row.
        keep: number of newest checkpoints to keep; 0 keeps all.
    """

    steps: int
    batch_size: int = 1
    micro_batch: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    save_every: int = 0
    log_every: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("steps", "batch_size", "log_every"), (1, None))
        _check_ranges(self, **ranges, **dict.fromkeys(("micro_batch", "save_every", "keep"), (0, None)))


@dataclass(frozen=True, kw_only=True)
class EmaRecipe:
    """Exponential moving average of the weights; if on, the averaged weights are saved.

    Args:
        decay: decay per step, in [0, 1); 0 is off. It increases from 0.1 as `(1 + step) / (10 + step)`.
    """

    decay: float = 0.0

    def __post_init__(self) -> None:
        _check_ranges(self, decay=(0, 1))


@dataclass(frozen=True, kw_only=True)
class OutputRecipe:
    """Output of the run.

    Args:
        folder: folder of checkpoints, `loss.csv` and the final weights.
        dtype: dtype of matrices in the weight files.
    """

    folder: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        _expand(self, "folder")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training run.

    Args:
        pipeline: reference to the pipeline class, or the name of a registered model with that pipeline.
        objective: `name` of a registered objective; the other keys are its options.
        components: role -> settings of its component. Roles that are not listed are not loaded.
        processors: role -> folder of a tokenizer or processor: a path, or a source such as "package://name/folder/".
        seed: seed of weights, sample order, captions and noise.
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


def read_recipe(path: str | Path, *, changes: Iterable[str] = ()) -> Recipe:
    """Return the `Recipe` (all settings of a training run) that a TOML file describes, after applying `changes` to it.

    Args:
        path: path of the TOML file.
        changes: overrides `"section.key=value"`; the value is parsed as TOML, or taken as text if it is not TOML.

    Raises:
        TrainingError: no such file, one that is not in UTF-8, invalid TOML, an unknown or missing key, or a value of
            another type; the message names the section and the nearest key.
        TypeError: `path` is no path.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path={shown(path)}: expected the path of a recipe, a TOML file")
    path = expanded(path)
    if not path.is_file():
        raise TrainingError(f"recipe {path} does not exist")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TrainingError(
            f"recipe {path} is not in UTF-8: byte {error.object[error.start]:#x} in line {line}; save it in UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"recipe {path} is not TOML: {error}") from error
    for change in changes:
        _change(content, change)
    return parse_section(Recipe, content, where="")


def parse_section(section: type[Section], content: Mapping[str, Any], *, where: str) -> Section:
    """Return an instance of the dataclass `section`, and of those nested in it, built from a parsed TOML table.

    Args:
        section: the dataclass.
        content: the table.
        where: dotted path of the table, for error messages; empty for the top level.

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
    """Return `value`, from a TOML file, converted to the type `hint`: tables to dataclasses, lists to tuples, int to
    float; other values that fit are unchanged.

    Raises:
        TrainingError: the value does not fit the hint.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return parse_section(typing.cast(type, hint), value, where=where)
    if origin is Literal:
        if value not in arguments:
            raise TrainingError(f"{where} = {value!r}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) != len(value):
            raise TrainingError(f"{where} has {len(value)} entries; expected {len(hints)}")
        return tuple(_parse(each, item, where) for each, item in zip(hints, value, strict=True))
    if origin in (Mapping, typing.get_origin(Mapping[str, Any])) and isinstance(value, Mapping):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
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


def _expand(section: Any, *names: str) -> None:
    """Replace `~` at the start of paths, fields of a frozen dataclass, by the home folder; empty ones stay empty."""
    for name in names:
        if path := getattr(section, name):
            object.__setattr__(section, name, str(expanded(path)))


def _check_ranges(section: Any, **ranges: tuple[float, float | None]) -> None:
    """Raise TrainingError for a field of a dataclass that is not a finite number of at least its first limit, and below
    its second one unless that is None.
    """
    for name, (least, below) in ranges.items():
        value = getattr(section, name)
        if not (math.isfinite(value) and value >= least and (below is None or value < below)):
            expected = f"a finite number of at least {least}" if below is None else f"a number in [{least}, {below})"
            raise TrainingError(f"{name} = {value!r}: expected {expected}")
