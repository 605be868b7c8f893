"""Model records and their lookup by name; `registry` is the public module."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffsynth import _discovery, _env
from diffsynth._discovery import Declared, Problem
from diffsynth._entry_points import GROUP, installed_version
from diffsynth.errors import AmbiguousModel, UnknownModel, did_you_mean, shown
from diffsynth.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Record of an installed model: the fields of its `ModelSpec`, its provider, and the state of its files.

    `weights` is "present", "partial" or "absent"; it is determined from file names alone, no file is opened.
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
        """The name `"plugin:name"`, such as `"flux:flux.1-dev"`; it is unique even if two plugins declare one name."""
        return f"{self.plugin}:{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dict: field -> value, mappings as dicts, in the order of declaration."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def models(pattern: str | None = None) -> list[ModelRecord]:
    """Return a list of the `ModelRecord`s, sorted by name, of the installed models whose name or hub id matches the
    glob `pattern`, case ignored; of all for None.

    Args:
        pattern: a glob; only models whose name or hub id matches it are returned. Case is ignored.

    Raises:
        TypeError: `pattern` is no text.
    """
    if not isinstance(pattern, str | None):
        raise TypeError(f"pattern={shown(pattern)}: expected a glob such as 'wan*', or None")
    declared = sorted(_discovery.catalog().models, key=lambda one: (one.spec.name.lower(), one.plugin))
    return [_record(one) for one in declared if pattern is None or _matches(one.spec, pattern.lower())]


def get(name: str) -> ModelRecord:
    """Return the `ModelRecord` of the only installed model with the name, hub id or `"plugin:name"` that is given, case
    ignored; raise UnknownModel if there is none, AmbiguousModel if there are several.

    Args:
        name: model name or hub id, case ignored; `"plugin:name"` if two plugins declare one name.

    Raises:
        UnknownModel: no plugin declares the name; the message gives the nearest name or the package to install, and
            lists broken plugins.
        AmbiguousModel: several plugins declare the name; the message gives the exact spellings.
        TypeError: `name` is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={shown(name)}: expected the name of a model, such as 'z-image-turbo'")
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
    """Return a list of the `Problem`s of plugins and of the installation as a whole; empty if there are none."""
    return [*_discovery.problems(), *_upstream()]


def refresh() -> None:
    """Discover plugins again, after one was installed or removed; later calls see the new ones. Plugins that `register`
    added stay.
    """
    _discovery.refresh()


def register(plugin: Any, *, name: str | None = None) -> None:
    """Register a plugin in the running program, for notebooks and applications; its declarations are found at once.

    It is checked like an installed plugin. Registered again under the same name, as when a cell of a notebook runs
    again, it takes the place of the former one. Pipelines that exist keep what they have. Thread-safe.

    Args:
        plugin: a module, or any object, that states `DIFFSYNTH_API` and has functions marked `@diffsynth.hookimpl`.
            Its declarations name code by reference, `"__main__:MyPipeline"` in a notebook or script.
        name: of the plugin, letters, digits, `_`, `-` and `.`; None is the name of the module, without its packages.

    Raises:
        TypeError: `plugin` has no function that is marked, or is no module and has no name.
        ValueError: the name is not one, or is that of an installed plugin.
        BrokenPlugin: the plugin is refused; the message has the reason. What was registered before stays.
    """
    if name is None and not inspect.ismodule(plugin):
        raise TypeError(f"plugin={shown(plugin)} is no module; expected name= for it")
    own = plugin.__name__.rpartition(".")[2].strip("_") if name is None else name
    if not isinstance(own, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", own):
        raise ValueError(
            f"name={shown(own)}: expected a name of letters, digits, '_', '-' and '.', such as 'my-models'"
        )
    found = {each: getattr(plugin, each, None) for each in dir(plugin)}
    marked = {each: value for each, value in found.items() if hasattr(value, f"{GROUP}_impl")}
    if not marked:
        raise TypeError(f"plugin={shown(plugin)} has no function marked @diffsynth.hookimpl; expected at least one")
    # The functions of now, in a module of their own: those of a notebook change when a cell runs again.
    module = types.ModuleType(own)
    vars(module).update(marked, DIFFSYNTH_API=found.get("DIFFSYNTH_API"))
    _discovery.register(module, own)
    _follow_catalog()


def unregister(name: str) -> None:
    """Remove a plugin that `register` added; later calls do not find its declarations. Pipelines that exist keep what
    they have.

    Raises:
        ValueError: no plugin was registered under the name.
    """
    _discovery.unregister(name)
    _follow_catalog()


def _follow_catalog() -> None:
    """Register the attention backends and doors of the catalog, where some are in use; else the first use does."""
    # Looked up, not imported: the first of these modules imports torch.
    if backends := sys.modules.get("diffsynth.runtime.declared_backends"):
        backends.use_declared_backends()
    if doors := sys.modules.get("diffsynth.pipelines"):
        doors.find_doors()


_SHARED = tuple(
    {field.name for field in dataclasses.fields(ModelRecord)} & {f.name for f in dataclasses.fields(ModelSpec)}
)
"""Fields of a record that are those of its `ModelSpec`."""


def _record(declared: Declared[ModelSpec]) -> ModelRecord:
    from diffsynth.core.loader.files import weights_state

    spec = declared.spec
    sources = [*spec.components.values(), *spec.processors.values()]
    return ModelRecord(
        **{name: getattr(spec, name) for name in _SHARED},
        plugin=declared.plugin,
        distribution=declared.distribution,
        version=declared.version,
        weights=weights_state(sources, _env.model_base_path()),
    )


def _matches(spec: ModelSpec, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(text.lower(), pattern) for text in (spec.name, spec.hub_id) if text)


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
    broken = _discovery.broken_plugins()
    return f"{name!r} is not installed{hint}" + (f"  {_discovery.describe(broken)}" if broken else "")


def _upstream() -> list[Problem]:
    """Return a list of one `Problem` if DiffSynth-Studio's `diffsynth`, of our import name, is installed; else []."""
    if (version := installed_version("diffsynth")) is None:
        return []
    error = (
        "installs the import name that diffsynth-core uses. "
        "Run: pip uninstall diffsynth && pip install --force-reinstall --no-deps diffsynth-core"
    )
    return [Problem("diffsynth", "diffsynth", version, error)]
