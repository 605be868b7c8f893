"""Model records and their lookup; `registry` is the public face."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffsynth import _discovery, _env
from diffsynth._discovery import Declared, Problem
from diffsynth.errors import AmbiguousModel, UnknownModel, did_you_mean
from diffsynth.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model that an installed plugin declares: its `ModelSpec`, who provides it, and whether its files are here.

    `weights` is "present", "partial" or "absent", told by names alone: no file is opened.
    """

    name: str
    hub_id: str | None
    family: str
    task: str
    pipeline: str
    components: Mapping[str, str]
    processors: Mapping[str, str]
    defaults: Mapping[str, Any]
    license: str
    paper: str
    description: str
    plugin: str
    distribution: str
    version: str
    weights: str
    fps: float | None = None

    @property
    def exact_name(self) -> str:
        """The spelling that stays exact when two plugins declare one name, `"flux:flux.1-dev"`."""
        return f"{self.plugin}:{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def models(pattern: str | None = None) -> list[ModelRecord]:
    """Records of all models, by name; with a glob, of those whose name or hub id it matches in any case."""
    declared = sorted(_discovery.catalog().models, key=lambda one: (one.spec.name.lower(), one.plugin))
    return [_record(one) for one in declared if pattern is None or _matches(one.spec, pattern.lower())]


def get(name: str) -> ModelRecord:
    """The record of a model.

    Args:
        name: a model's name or hub id, in any case; `"plugin:name"` where two plugins declare one name.

    Raises:
        UnknownModel: no plugin declares it; the message has the nearest spelling or the package to install, and the
            broken plugins.
        AmbiguousModel: several do; the message has the exact spellings.
    """
    wanted = name.strip().lower()
    declared = _discovery.catalog().models
    found = [one for one in declared if wanted in _spellings(one)]
    if len(found) == 1:
        return _record(found[0])
    if found:
        providers = {f"{one.plugin}:{one.spec.name}": f"{one.distribution} {one.version}" for one in found}
        exact = [f"{spelling!r} ({providers[spelling]})" for spelling in sorted(providers)]
        raise AmbiguousModel(f"{name!r} means {len(found)} models. Ask for one of {' or '.join(exact)}")
    raise UnknownModel(_unknown(name, declared))


def problems() -> list[Problem]:
    """What is wrong with plugins, and with the installation as a whole."""
    return [*_discovery.problems(), *_upstream()]


def refresh() -> None:
    """Look for plugins again, after installing or removing one."""
    _discovery.refresh()


def _record(declared: Declared[ModelSpec]) -> ModelRecord:
    from diffsynth.core.loader.files import weights_state

    fact = declared.spec
    sources = [*fact.components.values(), *fact.processors.values()]
    return ModelRecord(
        **{
            field.name: getattr(fact, field.name)
            for field in dataclasses.fields(ModelRecord)
            if hasattr(fact, field.name)
        },
        plugin=declared.plugin,
        distribution=declared.distribution,
        version=declared.version,
        weights=weights_state(sources, _env.model_base_path()),
    )


def _matches(fact: ModelSpec, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(text.lower(), pattern) for text in (fact.name, fact.hub_id) if text)


def _spellings(declared: Declared[ModelSpec]) -> set[str]:
    names = {text.lower() for text in (declared.spec.name, declared.spec.hub_id) if text}
    return names | {f"{declared.plugin.lower()}:{text}" for text in names}


def _unknown(name: str, declared: tuple[Declared[ModelSpec], ...]) -> str:
    from diffsynth.core.loader import first_party

    known = [text for one in declared for text in (one.spec.name, one.spec.hub_id) if text]
    bare = name.strip().rpartition(":")[2]
    if home := first_party.where_is_model(bare):
        hint = f". {home}"
    elif not (hint := did_you_mean(name, known)):
        hint = f". {first_party.near_model(bare) or 'Run: diffsynth list'}"
    broken = _discovery.problems()
    return f"{name!r} is not installed{hint}" + (f"  {_discovery.describe(broken)}" if broken else "")


def _upstream() -> list[Problem]:
    import importlib.metadata

    try:
        version = importlib.metadata.version("diffsynth")
    except importlib.metadata.PackageNotFoundError:
        return []
    error = (
        "installs the import name that diffsynth-core uses. "
        "Run: pip uninstall diffsynth && pip install --force-reinstall --no-deps diffsynth-core"
    )
    return [Problem("diffsynth", "diffsynth", version, error)]
