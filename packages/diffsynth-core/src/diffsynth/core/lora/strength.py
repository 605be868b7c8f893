"""The strength of a LoRA where its writer put it: the file's metadata, or an `adapter_config.json` beside it. No torch.

An alpha that stands in the file beside a layer's matrices comes first, and is not read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth.core.loader.lora_match import role_hint, without_prefixes
from diffsynth.errors import CorruptFile, KeyMismatch
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

CONFIG_NAME = "adapter_config.json"
_CONFIG_LIMIT = 16 * 2**20

_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
_RANKS = ("r", "rank", "lora_rank", "lora_r", "lora_dim", "network_dim", "ss_network_dim", "network_rank", "dim")
_OBJECTS = ("lora_adapter_metadata", "adapter_config", "lora_config", "peft_config")
"""Metadata entries that hold a JSON object: diffusers writes the first."""

_NO_NUMBER = ("", "none", "null", "dynamic")
"""Texts by which kohya says that there is no one number."""

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations of peft that change the weights of the base model, too."""

_NAME = re.compile(r"\^?(?:[\w\-.]|\\\.)+\$?")
_GAP = re.compile(r"\.[*+]\??")
_EXPRESSION = re.compile(r"(?=.{1,300}$)(?:[\w\-.^$|()\[\]]|\\[.d_\-]|(?<=\.)[*+]\??|(?<=\\d)\+|(?<=\])\+)*")
_MAX_EXPRESSIONS = 100


@dataclass(frozen=True)
class Declared:
    """The strength that one source declares for the layers of one component.

    Args:
        source: where it stands, for messages.
        scope: the component's prefix, `"transformer"`; empty for all.
        alpha: alpha of the layers; None if it is not stated.
        rank: rank of the layers; None if it is not stated.
        rslora: whether the factor is `alpha / sqrt(rank)` (Kalajdzievski 2023, arXiv:2312.03732).
        dora: whether every layer has magnitudes.
        alpha_pattern, rank_pattern: names of layers, or regular expressions of them, -> their own values.
    """

    source: str
    scope: str = ""
    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    dora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, float] = field(default_factory=dict)


class Strengths:
    """The factors of a LoRA's layers, as its writer declared them.

    Args:
        declared: what the sources say; the first that applies to a layer counts.
        where: the file's name, for messages.
    """

    def __init__(self, declared: Sequence[Declared] = (), where: str = "") -> None:
        self.declared = tuple(declared)
        self.where = where
        self._scoped = {each.scope: each for each in reversed(self.declared) if each.scope}
        self._by_kind = {
            is_text: each
            for each in reversed(self.declared)
            for is_text in (False, True)
            if not each.scope or each.scope.startswith("text_encoder") == is_text
        }
        self._patterns = {id(each): (_Patterns(each.alpha_pattern), _Patterns(each.rank_pattern)) for each in declared}
        self._differing: dict[str, str] = {}

    def of(self, module: str) -> Declared | None:
        """Return what is declared for the layer `module`, with its name in the file; None if nothing is."""
        name = module.removeprefix("base_model.model.")
        for index, char in enumerate(name):
            if char == "." and (found := self._scoped.get(name[:index])):
                return found
        return self._by_kind.get(role_hint(module)[0] == "text")

    def scale(self, module: str, rank: int) -> float | None:
        """Return the factor of a layer, None if none is declared.

        Args:
            module: the layer's name in the file.
            rank: rank of its matrices, 0 if the kind has none.
        """
        found = self.of(module)
        if found is None:
            return None
        alphas, ranks = self._patterns[id(found)]
        alpha, declared = alphas.value(module, found.alpha), ranks.value(module, found.rank)
        if alpha is None:
            return None
        if rank and declared is not None and declared != rank:
            self._differing.setdefault(module, f"rank {rank}, declared {declared:g}")
        divisor = rank or declared
        if not divisor:
            return 1.0
        return alpha / math.sqrt(divisor) if found.rslora else alpha / divisor

    def log_differences(self) -> None:
        """Log a warning if matrices had another rank than the one declared for them; they count."""
        if self._differing:
            module, text = next(iter(self._differing.items()))
            logger.warning(
                "%s: %d layers have another rank than its metadata says (%s: %s); alpha is divided by that of the "
                "matrices", self.where, len(self._differing), module, text,
            )  # fmt: skip


def strengths_of(where: str, metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> Strengths:
    """Return the `Strengths` that the metadata of a file and an `adapter_config.json` declare.

    Args:
        where: the file's name, for messages.
        metadata: the text entries of the safetensors header.
        config: the contents of the `adapter_config.json`; it comes before flat metadata entries.

    Raises:
        KeyMismatch: an entry does not parse, or the base model's weights were changed, too.
    """
    declared: list[Declared] = []
    flat: dict[str, dict[str, Any]] = {}
    for key, text in metadata.items():
        if key in _OBJECTS:
            parsed = _json(f"{where}: metadata {key}", text)
            if isinstance(parsed, Mapping):
                declared += _scoped(f"{where}, metadata {key}", parsed)
        else:
            scope, _, name = key.rpartition(".")
            if name in (*_ALPHAS, *_RANKS, "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
                flat.setdefault(scope, {})[name] = text
    if config is not None:
        declared += _scoped(f"{CONFIG_NAME} beside {where}", config)
    for scope, entries in flat.items():
        declared.append(_declared(f"{where}, metadata", scope, entries))
    return Strengths([each for each in declared if _says_something(each)], where)


def read_adapter_config(file: Path) -> dict[str, Any] | None:
    """Return the contents of the `adapter_config.json` that belongs to a LoRA file, a dict; None if there is none.

    It belongs to `adapter_model.*`, and to any other file that is the only one with weights in its folder.

    Args:
        file: the LoRA file.

    Raises:
        CorruptFile: it is no JSON object, or larger than 16 MB.
    """
    path = file.with_name(CONFIG_NAME)
    if not path.is_file():
        return None
    if file.stem != "adapter_model":
        others = [each for each in file.parent.iterdir() if each != file and each.suffix == file.suffix]
        if others:
            logger.warning("%s is not read for %s, because %s is there, too", path, file.name, others[0].name)
            return None
    if path.stat().st_size > _CONFIG_LIMIT:
        raise CorruptFile(f"{path} has {path.stat().st_size:,} bytes; expected the JSON of a peft adapter")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is no JSON: {error}. Fetch it again") from None
    if not isinstance(found, dict):
        raise CorruptFile(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def _says_something(declared: Declared) -> bool:
    return declared.alpha is not None or bool(declared.alpha_pattern) or declared.dora


def _scoped(source: str, entries: Mapping[str, Any]) -> list[Declared]:
    """Return a list with a `Declared` for each scope of a JSON object: `"transformer.r"`, or nested by component."""
    scopes: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        scope, _, name = str(key).rpartition(".")
        if isinstance(value, Mapping) and not scope and {"lora_alpha", "r"} & value.keys():
            scopes.setdefault(name, {}).update(value)
        else:
            scopes.setdefault(scope, {})[name] = value
    return [_declared(source, scope, found) for scope, found in scopes.items()]


def _declared(source: str, scope: str, entries: Mapping[str, Any]) -> Declared:
    start = entries.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise KeyMismatch(
            f"{source}: init_lora_weights is {start!r}, which changed the weights of the base model, too. Convert the "
            "adapter with peft: save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    rank = _first(source, entries, _RANKS)
    return Declared(
        source,
        scope,
        alpha=_first(source, entries, _ALPHAS),
        rank=int(rank) if rank else None,
        rslora=_truth(source, "use_rslora", entries.get("use_rslora")),
        dora=_truth(source, "use_dora", entries.get("use_dora")),
        alpha_pattern=_pattern(source, "alpha_pattern", entries.get("alpha_pattern")),
        rank_pattern=_pattern(source, "rank_pattern", entries.get("rank_pattern")),
    )


def _first(source: str, entries: Mapping[str, Any], names: Sequence[str]) -> float | None:
    found = (_number(source, name, entries[name]) for name in names if name in entries)
    return next((number for number in found if number is not None), None)


def _number(source: str, name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in _NO_NUMBER):
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise KeyMismatch(f"{source}: {name} is {str(value)[:80]!r}; expected a finite number")
    return number


def _truth(source: str, name: str, value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "none", "null", ""):
        raise KeyMismatch(f"{source}: {name} is {str(value)[:80]!r}; expected true or false")
    return text in ("true", "1")


def _pattern(source: str, name: str, value: Any) -> dict[str, float]:
    if isinstance(value, str) and value:
        value = _json(f"{source}: {name}", value)
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise KeyMismatch(f"{source}: {name} is a {type(value).__name__}; expected layers and their numbers")
    _check_expressions(source, name, [str(key) for key in value])
    numbers = {str(key): _number(source, f"{name}[{str(key)!r}]", each) for key, each in value.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _check_expressions(source: str, name: str, texts: Sequence[str]) -> None:
    """Raise KeyMismatch unless every text is a layer's name, or an expression that is matched in linear time."""
    expressions = [text for text in texts if not _NAME.fullmatch(text)]
    bad = next((text for text in expressions if not _EXPRESSION.fullmatch(text)), None)
    if bad is None and len(expressions) <= _MAX_EXPRESSIONS:
        for text in expressions:
            try:
                _Expression(text)
            except re.error as error:
                raise KeyMismatch(f"{source}: {name} has {text[:80]!r}, which is no expression: {error}") from None
        return
    seen = f"{len(expressions)} expressions" if bad is None else repr(bad[:80])
    raise KeyMismatch(
        f"{source}: {name} has {seen}; expected names of layers, and at most {_MAX_EXPRESSIONS} expressions of up to "
        r"300 characters made of names, alternatives, `.*`, `.+` and `\d+`"
    )


def _json(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KeyMismatch(f"{what} is no JSON: {error}") from None


class _Expression:
    """A regular expression of peft's patterns, matched as a sequence of pieces between `.*`, in linear time."""

    def __init__(self, text: str) -> None:
        bounded = re.sub(r"(\\d|\])\+", r"\1{1,8}", text.removeprefix("^").removesuffix("$"))
        self._anchored = text.startswith("^")
        pieces = [f"(?:{piece})" for piece in _GAP.split(bounded)]
        pieces[-1] += "$"
        self._first = re.compile((r"^" if self._anchored else r"(?:^|(?<=\.))") + pieces[0])
        self._rest = [re.compile(piece) for piece in pieces[1:]]

    def matches(self, name: str) -> bool:
        """Whether the expression matches `name`, or an end of it behind a dot unless it is anchored."""
        found = self._first.search(name)
        for piece in self._rest:
            found = piece.search(name, found.end()) if found else None
        return found is not None


class _Patterns:
    """Values of layers by name, as peft looks them up: the first pattern that matches the name's end counts."""

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self._values = list(patterns.values())
        self._ends: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        self._expressions: list[tuple[int, _Expression]] = []
        for number, text in enumerate(patterns):
            if _NAME.fullmatch(text):
                bare = text.removeprefix("^").removesuffix("$").replace("\\.", ".")
                (self._whole if text.startswith("^") else self._ends).setdefault(bare, number)
            else:
                self._expressions.append((number, _Expression(text)))

    def value(self, module: str, default: float | None) -> float | None:
        """Return the value of the layer `module`, with its name in the file, or `default`."""
        names = list(without_prefixes(module)) if self._values else []
        found = [self._whole[name] for name in names if name in self._whole]
        for index in [-1, *(index for index, char in enumerate(module) if char == ".")] if self._ends else []:
            if (end := module[index + 1 :]) in self._ends:
                found.append(self._ends[end])
        found += [n for n, expression in self._expressions if any(map(expression.matches, names))]
        return self._values[min(found)] if found else default
