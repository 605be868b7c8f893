"""What can be known to be wrong with a declaration without importing the code that it names."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from importlib.machinery import PathFinder
from typing import Any

from diffsynth import spec
from diffsynth.errors import did_you_mean

_REFERENCES: dict[type, tuple[str, ...]] = {
    spec.ModelSpec: ("pipeline", "tiny_processors"),
    spec.ArchitectureSpec: ("module", "config", "infer_config", "tiny", "tiny_inputs", "atomic"),
    spec.CheckpointSpec: ("rules",),
    spec.LayerWrapperSpec: ("layer",),
    spec.AttentionSpec: ("backend", "workspace"),
    spec.QuantizationSpec: ("backend",),
    spec.TrainingSpec: ("pipeline", "schedule"),
    spec.ObjectiveSpec: ("objective",),
    spec.UnitSpec: ("pipeline", "unit"),
    spec.CommandSpec: ("command",),
    spec.DoorSpec: (),
}


def references(fact: Any) -> list[str]:
    """Every code reference in a declaration, empty ones left out."""
    values = [getattr(fact, name) for name in _REFERENCES[type(fact)]]
    return [text for value in values for text in _texts(value) if text]


def sources(fact: Any) -> list[str]:
    """Every source of files in a declaration."""
    if isinstance(fact, spec.ModelSpec):
        return [*fact.components.values(), *fact.processors.values()]
    return list(fact.files) if isinstance(fact, spec.CheckpointSpec) else []


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        return value.values()
    return (value,) if isinstance(value, str) else value


def identity(fact: Any) -> str:
    """What must be unique among one plugin's declarations of a kind; empty where nothing is."""
    return str(getattr(fact, "name", "")).lower()


def check_spec(fact: Any) -> None:
    """Check names, references and sources by their text; modules of imported packages must exist.

    Raises:
        TypeError: a mapping field that holds none.
        ValueError: a malformed name, reference or source, a reference to a module that is not there, a declaration that
            says nothing, or a tiny config for a component that the model does not have.
    """
    name = getattr(fact, "name", "-")
    if not name or (isinstance(fact, spec.ModelSpec) and (":" in name or "/" in name)):
        raise ValueError(f"name {name!r}: expected a plain name, without ':' or '/'")
    for entry in fields(fact):
        if "Mapping" in str(entry.type) and not hasattr(getattr(fact, entry.name), "items"):
            raise TypeError(f"{name!r}: {entry.name} is {getattr(fact, entry.name)!r}, expected a mapping")
    if isinstance(fact, spec.ModelSpec):
        _check_tiny(fact)
    if isinstance(fact, spec.LayerWrapperSpec) and not fact.atomic:
        raise ValueError(f"LayerWrapperSpec({fact.layer!r}) says nothing of that class; expected atomic=True")
    for source in sources(fact):
        spec.parse_source(source)
    for reference in references(fact):
        module_name, colon, attribute = reference.partition(":")
        if not (colon and module_name and attribute):
            raise ValueError(f"reference {reference!r}: expected 'package.module:attribute'")
        if not _may_exist(module_name):
            raise ValueError(f"reference {reference!r}: there is no module {module_name!r}")


def _check_tiny(fact: spec.ModelSpec) -> None:
    for role, changed in fact.tiny.items():
        if role not in fact.components:
            raise ValueError(
                f"{fact.name!r}: tiny has {role!r}, no component{did_you_mean(role, fact.components) or '.'} "
                f"Its components: {', '.join(fact.components)}"
            )
        if not isinstance(changed, Mapping):
            raise TypeError(f"{fact.name!r}: tiny[{role!r}] is {changed!r}, expected a mapping of config fields")


def duplicates(declared: Iterable[Any]) -> Iterator[tuple[str, str, str, str]]:
    """(plugin, distribution, version, what is wrong) for every declaration whose name other plugins use too."""
    by_name: dict[str, list[Any]] = {}
    for one in declared:
        by_name.setdefault(identity(one.spec), []).append(one)
    for name, several in by_name.items():
        for one in several if len(several) > 1 else ():
            others = ", ".join(f"{other.plugin} ({other.distribution})" for other in several if other is not one)
            kind = type(one.spec).__name__.removesuffix("Spec").lower()
            removable = sorted({each.distribution for each in several if each.plugin != "core"})
            yield (
                one.plugin,
                one.distribution,
                one.version,
                f"{kind} {name!r} is also declared by {others}. Keep one of them: pip uninstall "
                + ", or: pip uninstall ".join(removable),
            )


def _may_exist(module_name: str) -> bool:
    """False if the module cannot be found; finds without importing, so only inside packages imported already."""
    package, *rest = module_name.split(".")
    if package not in sys.modules:
        return True
    path = getattr(sys.modules[package], "__path__", None)
    name = package
    for part in rest:
        name = f"{name}.{part}"
        found = PathFinder.find_spec(name, path) if path is not None else None
        if found is None:
            return name in sys.modules
        path = found.submodule_search_locations
    return True
