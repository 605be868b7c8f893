"""Tiny versions of registered models: folders with the file names of the hub and small random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffsynth import _discovery, registry
from diffsynth.core.loader import component, convert
from diffsynth.core.loader.layouts import rules_of
from diffsynth.errors import did_you_mean
from diffsynth.runtime.composition import compose
from diffsynth.runtime.role import Processor, Role, Tokenizer, role_of
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, ModelSpec, parse_source, resolve
from diffsynth.testing.tiny_files import TinyFile, TinyTensor, tiny_shapes, write_weights

MAX_MODEL_BYTES = 40_000_000
"""Largest size of the weights of one tiny model, in bytes."""

MARK = "tiny-hub.json"
"""File at the root of a tiny hub: lists its models and marks the folder as one that may be overwritten."""

_DEFAULT_PROCESSORS = dict.fromkeys(
    (Processor.loader, Tokenizer.loader), "diffsynth.testing.tiny_processors:write_byte_tokenizer"
)
"""Loader of a processor -> default writer of a tiny one; `ModelSpec.tiny_processors` has precedence."""


def tiny_hub(root: Path | str, models: Sequence[str] | str | None = None) -> list[Path]:
    """Write tiny versions of the named models (all for None) under the hub's file names below the folder `root`, and
    return a sorted list of the paths of the written weight files and processor folders.

    With `DIFFSYNTH_MODEL_BASE_PATH=root` and `DIFFSYNTH_SKIP_DOWNLOAD=true`, `diffsynth.load` and `from_pretrained`
    find the file names of the hub under `<owner>/<repository>`, with few layers, random bf16 weights under the
    published key names, and working processors. The same call writes the same bytes. Sources of another scheme, such
    as `package://`, are not on the hub and are skipped.

    Args:
        root: path of a folder that is empty, missing, or a tiny hub.
        models: names or hub ids; None for all registered models.

    Returns:
        the paths of weight files and of processor folders, sorted.

    Raises:
        UnknownModel: no such model is installed; the message gives the nearest name.
        ValueError: no tiny files can be made from a model's declarations; the message says what to declare.
        KeyMismatch: the rules do not convert the published keys to those of the network.
        FileExistsError: `root` is neither empty nor a tiny hub.
    """
    root = Path(root)
    tiny = [_tiny_model(spec) for spec in _chosen(models)]
    weights, processors = _merge_models(tiny)
    _claim(root, [model.name for model in tiny])
    written = []
    for text, file in weights.items():
        source = parse_source(text)
        written += write_weights(root / source.model_id, source.pattern, file.contents, file_stem=file.file_stem)
    for text, reference in processors.items():
        source = parse_source(text)
        folder = root / source.model_id / source.pattern
        folder.mkdir(parents=True, exist_ok=True)
        resolve(reference)(folder)
        written.append(folder)
    return sorted(written)


@dataclass(frozen=True)
class _Weights:
    """The tiny weights of one source.

    Args:
        contents: published key -> shape and dtype.
        file_stem: see `CheckpointSpec`.
        dropped: keys that the component does not read.
    """

    contents: TinyFile
    file_stem: str
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _TinyModel:
    """The tiny weights and processors of one model by source; nothing is written yet."""

    name: str
    weights: Mapping[str, _Weights]
    processors: Mapping[str, str]


def _chosen(names: Sequence[str] | str | None) -> list[ModelSpec]:
    declared = _discovery.catalog().models
    if names is None:
        return [one.spec for one in declared]
    wanted = {registry.get(name).exact_name for name in ([names] if isinstance(names, str) else names)}
    return [one.spec for one in declared if f"{one.plugin}:{one.spec.name}" in wanted]


def _tiny_model(spec: ModelSpec) -> _TinyModel:
    if not any(_is_on_hub(source) for source in (*spec.components.values(), *spec.processors.values())):
        return _TinyModel(spec.name, {}, {})
    roles: Mapping[str, Role | Processor] = compose(resolve(spec.pipeline)).roles
    weights: dict[str, _Weights] = {}
    for role, source in spec.components.items():
        if _is_on_hub(source):
            component_weights = _component(spec, role, roles.get(role_of(role)), source)
            known = weights.get(source)
            weights[source] = (
                component_weights if known is None else _merge_components(known, component_weights, source)
            )
    tensors = [(tensor, key) for file in weights.values() for key, tensor in file.contents.items()]
    size = sum(tensor.nbytes for tensor, _ in tensors)
    if size > MAX_MODEL_BYTES:
        largest, key = max(tensors, key=lambda each: (each[0].nbytes, each[1]))
        raise ValueError(
            f"model {spec.name!r}: its tiny weights take {size:,} bytes, limit {MAX_MODEL_BYTES:,}; the largest is "
            f"{key!r} of shape {largest.shape}. Make ModelSpec.tiny smaller."
        )
    return _TinyModel(spec.name, weights, dict(_tiny_processors(spec, roles)))


def _is_on_hub(source: str) -> bool:
    return not parse_source(source).scheme


def _component(spec: ModelSpec, role: str, need: Role | Processor | None, source: str) -> _Weights:
    if not isinstance(need, Role):
        raise ValueError(f"model {spec.name!r}: {role!r} is not a component of {spec.pipeline}")
    architecture, checkpoint = _layout_for(spec, role, need, source)
    changed = {**checkpoint.config, **spec.tiny.get(role, {})}
    try:
        config = replace(resolve(architecture.tiny), **changed)
    except TypeError as error:
        raise ValueError(f"model {spec.name!r}: tiny[{role!r}] does not fit {architecture.config}: {error}") from None
    state = component.build(architecture, config).state_dict()
    try:
        shapes = tiny_shapes(checkpoint, {key: tuple(tensor.shape) for key, tensor in state.items()})
    except ValueError as error:
        raise ValueError(f"model {spec.name!r}, {role!r}: {error}") from None
    dropped = frozenset(convert.plan(rules_of(checkpoint), shapes).dropped)
    return _Weights(_with_dtypes(shapes, checkpoint, state), checkpoint.file_stem, dropped)


def _layout_for(spec: ModelSpec, role: str, need: Role, source: str) -> tuple[ArchitectureSpec, CheckpointSpec]:
    """Return the pair (`ArchitectureSpec`, `CheckpointSpec`) by which the file `source` of a model is written: of the
    first checkpoint for this role that lists the file, else of the first that has no rules.
    """
    architectures, checkpoints = _discovery.catalog().layouts()
    known = [one for one in checkpoints if one.architecture in architectures]
    fitting = [one for one in known if need.accepts(architectures[one.architecture])]
    fitting.sort(key=lambda one: one.architecture not in need.architectures)  # those accepted by another's name last
    listed = [one for one in fitting if source in one.files] or [one for one in fitting if not one.rules]
    if not listed:
        files = [file for one in fitting for file in one.files]
        raise ValueError(
            f"model {spec.name!r}: no checkpoint of {' or '.join(need.architectures)} lists {source!r}"
            f"{did_you_mean(source, files) or '.'} Add it to the files of its CheckpointSpec."
        )
    return architectures[listed[0].architecture], listed[0]


def _with_dtypes(
    shapes: Mapping[str, tuple[int, ...]], checkpoint: CheckpointSpec, state: Mapping[str, torch.Tensor]
) -> TinyFile:
    """Return a dict key -> `TinyTensor` (shape, dtype) for a tiny file; the dtype is bf16, or that of `state` for
    integer tensors.
    """
    integers = {
        source: state[key].dtype
        for key, target in convert.plan(rules_of(checkpoint), shapes).targets.items()
        for source in target.sources
        if not state[key].is_floating_point()
    }
    return {key: TinyTensor(shape, integers.get(key, torch.bfloat16)) for key, shape in shapes.items()}


def _tiny_processors(spec: ModelSpec, roles: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield a pair (source, `"module:function"` that writes a tiny version of it) for each processor that a model loads
    from the hub.
    """
    for role, need in roles.items():
        source = spec.processors.get(role) or ("" if not isinstance(need, Processor) or need.optional else need.source)
        if not source or not _is_on_hub(source):
            continue
        reference = spec.tiny_processors.get(role) or _DEFAULT_PROCESSORS.get(need.loader)
        if reference is None:
            raise ValueError(
                f"model {spec.name!r}: no tiny {role} is known for {need.loader}. Declare ModelSpec.tiny_processors["
                f"{role!r}], a reference to f(folder) that writes one."
            )
        yield source, reference


def _merge_components(first: _Weights, second: _Weights, source: str) -> _Weights:
    """Return the `_Weights` of a file that two components share; raise ValueError if they disagree about a key.

    It contains the keys that one of them reads and those that both drop (also in `dropped`).
    """
    read = [
        {key: tensor for key, tensor in each.contents.items() if key not in each.dropped} for each in (first, second)
    ]
    for key, tensor in read[1].items():
        if (other := read[0].get(key, tensor)) != tensor:
            raise ValueError(
                f"{source} holds two components, and {key!r} would be {other.shape} for one and {tensor.shape} for the "
                f"other. Change ModelSpec.tiny so that they agree."
            )
    unread = first.dropped & second.dropped
    rest = {key: tensor for key, tensor in first.contents.items() if key in unread}
    return _Weights({**read[0], **read[1], **rest}, first.file_stem, unread)


def _merge_models(models: Iterable[_TinyModel]) -> tuple[dict[str, _Weights], dict[str, str]]:
    """Return two dicts that merge the files of all models: source -> `_Weights`, and source -> `"module:function"` that
    writes a processor.

    Raises:
        ValueError: models that share a source do not agree on it.
    """
    found: dict[str, tuple[str, Any]] = {}
    for model in models:
        for source, file in (*model.weights.items(), *model.processors.items()):
            other, known = found.setdefault(source, (model.name, file))
            if known != file:
                raise ValueError(
                    f"models {other!r} and {model.name!r} share {source} and make different tiny files of it. "
                    f"Declare the same ModelSpec.tiny and tiny_processors for it in both."
                )
    weights = {source: file for source, (_, file) in found.items() if isinstance(file, _Weights)}
    return weights, {source: writer for source, (_, writer) in found.items() if isinstance(writer, str)}


def _claim(root: Path, names: Sequence[str]) -> None:
    """Create the folder `root` if missing, and add `names` to the file in it that marks it as a tiny hub and lists its
    models.

    Raises:
        FileExistsError: `root` is neither empty nor a tiny hub; tiny weights are never written among real ones.
    """
    mark = root / MARK
    if root.exists() and not mark.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is not empty and not a tiny hub (it has no {MARK}). Choose a new folder.")
    root.mkdir(parents=True, exist_ok=True)
    before = json.loads(mark.read_text(encoding="utf-8"))["models"] if mark.exists() else []
    mark.write_text(json.dumps({"models": sorted({*before, *names})}, indent=2) + "\n", encoding="utf-8")
