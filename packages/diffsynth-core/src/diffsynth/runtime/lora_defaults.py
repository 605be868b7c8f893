"""Defaults of calls that a loaded LoRA sets, such as four steps without guidance for one that is distilled.

They are in the LoRA's file (`save_lora(call_defaults=)`), or a plugin declares them for a published file
(`register_loras`). A call's own arguments have precedence.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffsynth import _discovery
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.lora import LoRA
from diffsynth.errors import did_you_mean
from diffsynth.runtime.published_defaults import is_in_repository
from diffsynth.runtime.unit import equals_default
from diffsynth.spec import LoRASpec, parse_source


class SetsDefaults(Protocol):
    """A loaded LoRA, as far as its defaults go: `LoadedLoRA`."""

    where: str
    call_defaults: Mapping[str, Any]


def published_lora(pipeline: type, config: ModelConfig | None, paths: Sequence[Path]) -> LoRASpec | None:
    """Return the declaration of a published LoRA for a pipeline; None for an unknown file.

    Args:
        pipeline: class of the pipeline; a declaration for a base class counts, too.
        config: the LoRA that the user names; None for a state dict.
        paths: the files that were found.
    """
    classes = {f"{cls.__module__}:{cls.__qualname__}" for cls in pipeline.__mro__}
    for declared in _discovery.catalog().loras:
        if declared.spec.pipeline in classes and any(_is_of(declared.spec, config, path) for path in paths):
            return declared.spec
    return None


def _is_of(spec: LoRASpec, config: ModelConfig | None, path: Path) -> bool:
    if any(fnmatch.fnmatchcase(path.name.lower(), pattern.lower()) for pattern in spec.names):
        return True
    return any(
        fnmatch.fnmatchcase(f"/{path.as_posix()}", f"*/{source.pattern}")
        and ((config is not None and config.model_id == source.model_id) or is_in_repository(source.model_id, path))
        for source in map(parse_source, spec.files)
    )


def declared_defaults(
    pipeline: type, lora: LoRA, *, config: ModelConfig | None, paths: Sequence[Path]
) -> Mapping[str, Any]:
    """Return the defaults of calls that a LoRA sets by itself, argument -> default: those in its file, else those that
    a plugin declares for it.

    Args:
        pipeline, config, paths: see `published_lora`.
        lora: the LoRA.
    """
    spec = None if lora.call_defaults else published_lora(pipeline, config, paths)
    return lora.call_defaults if spec is None else spec.defaults


def defaults_of(
    pipe: Any, lora: LoRA, given: Mapping[str, Any] | None, *, config: ModelConfig | None, paths: Sequence[Path]
) -> dict[str, Any]:
    """Return a dict argument -> default of the calls of a pipeline while a LoRA is loaded.

    Args:
        pipe: the pipeline.
        lora: the LoRA.
        given: those that the user gives, in place of the LoRA's own; None for its own.
        config, paths: see `published_lora`.

    Raises:
        ValueError: an argument that the pipeline does not have, or a value that it refuses.
    """
    where = "call_defaults" if given is not None else f"the record of {lora.where}"
    if given is None:
        given = declared_defaults(type(pipe), lora, config=config, paths=paths)
    parameters = pipe.__signature__.parameters
    for name, value in given.items():
        if name not in parameters:
            raise ValueError(
                f"{where} sets a default of {name!r}, which {type(pipe).__name__} does not take"
                f"{did_you_mean(name, parameters)} Pass call_defaults={{}} to leave its defaults out"
            )
        try:
            pipe.check_value(name, value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} sets a default that calls refuse: {error}") from error
    return dict(given)


def joined_defaults(loras: Iterable[SetsDefaults]) -> dict[str, Any]:
    """Return a dict argument -> default of calls with several loaded LoRAs.

    Args:
        loras: in the order of loading.

    Raises:
        ValueError: two that set different defaults of one argument.
    """
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for lora in loras:
        for name, value in lora.call_defaults.items():
            if name in found and not (found[name] is value or equals_default(value, found[name])):
                raise ValueError(
                    f"{lora.where} sets {name}={value!r} as the default of calls, and {owners[name]}, which is loaded, "
                    f"{name}={found[name]!r}. Pass call_defaults={{}} to load it without its defaults, or call "
                    "clear_lora() before, which removes hot LoRAs"
                )
            found[name], owners[name] = value, lora.where
    return found
