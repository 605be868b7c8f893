"""Checks of declarations that need no import of the code they name: names, references, sources, duplicates."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from typing import Any

from diffsynth import spec
from diffsynth.errors import did_you_mean

_REFERENCES: dict[type, tuple[str, ...]] = {
    spec.ModelSpec: ("pipeline", "tiny_processors", "tiny_inputs"),
    spec.ArchitectureSpec: ("module", "config", "infer_config", "tiny", "tiny_inputs", "atomic"),
    spec.CheckpointSpec: ("rules",),
    spec.LayerWrapperSpec: ("layer",),
    spec.AttentionSpec: ("backend", "workspace"),
    spec.SolverSpec: ("solver",),
    spec.QuantizationSpec: ("backend",),
    spec.TrainingSpec: ("pipeline", "schedule"),
    spec.ObjectiveSpec: ("objective",),
    spec.FeatureSpec: ("pipeline", "feature"),
    spec.CommandSpec: ("command",),
    spec.WriterSpec: ("writer",),
    spec.DoorSpec: (),
    spec.GuidanceSpec: ("guidance",),
    spec.LoRASpec: ("pipeline",),
}


def references(declaration: Any) -> list[str]:
    """Return a list of the non-empty references to code, texts "package.module:attribute", in a declaration."""
    values = [getattr(declaration, name) for name in _REFERENCES[type(declaration)]]
    return [text for value in values for text in texts(value) if text]


def sources(declaration: Any) -> list[str]:
    """Return a list of the source strings, such as "owner/repo:*.pt", in a `ModelSpec`, a `CheckpointSpec` or a
    `LoRASpec`; empty for other declarations.
    """
    if isinstance(declaration, spec.ModelSpec):
        return [*declaration.components.values(), *declaration.processors.values()]
    return list(declaration.files) if isinstance(declaration, spec.CheckpointSpec | spec.LoRASpec) else []


def texts(value: Any) -> Iterable[str]:
    """Return the texts of a field of a declaration, which is a text, a tuple of texts or a mapping to texts."""
    if isinstance(value, Mapping):
        return value.values()
    return (value,) if isinstance(value, str) else value


def identity(declaration: Any) -> str:
    """Return a declaration's name, or the suffix of a `WriterSpec`, in lower case, which is unique per plugin and kind;
    "" for a kind without names.
    """
    name = declaration.suffix if isinstance(declaration, spec.WriterSpec) else getattr(declaration, "name", "")
    return str(name).lower()


def check_spec(declaration: Any) -> None:
    """Raise ValueError if a declaration of plain values (see `plain_copy`) has a malformed name, reference, source,
    tiny config or number, or no effect; nothing that it names is imported.

    A referenced module is looked up only if its top-level package is imported already.

    Raises:
        ValueError: a malformed name, suffix, reference or source, a reference to a missing module, an
            `ArchitectureSpec` without a module that is not `not_runnable`, a `LayerWrapperSpec` without effect, a
            `SolverSpec` without evaluations, a `FeatureSpec` of a pipeline and a family, a `LoRASpec` without files or
            defaults, or a tiny config for a component that the model does not have.
    """
    name = getattr(declaration, "name", "-")
    is_plain = bool(name) and name.isprintable() and name == name.strip()
    if not is_plain or (isinstance(declaration, spec.ModelSpec | spec.GuidanceSpec) and (":" in name or "/" in name)):
        raise ValueError(f"name {name!r}: expected a plain name, without ':' or '/', or control characters")
    if isinstance(declaration, spec.CommandSpec) and not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name {name!r}: expected a command of letters, digits, '_', '-' and '.'")
    if isinstance(declaration, spec.ModelSpec):
        _check_tiny(declaration)
    if isinstance(declaration, spec.ArchitectureSpec) and bool(declaration.module) == bool(declaration.not_runnable):
        raise ValueError(f"{name!r}: expected a module, or not_runnable, which says what the files are; not both")
    if isinstance(declaration, spec.LayerWrapperSpec) and not declaration.atomic:
        raise ValueError(f"LayerWrapperSpec({declaration.layer!r}) has no effect; expected atomic=True")
    if isinstance(declaration, spec.FeatureSpec) and declaration.pipeline and declaration.family:
        raise ValueError(
            f"FeatureSpec({declaration.feature!r}) names a pipeline and a family; expected one of them, or none"
        )
    if isinstance(declaration, spec.LoRASpec):
        _check_lora(declaration)
    if isinstance(declaration, spec.SolverSpec):
        _check_evaluations(declaration)
    if isinstance(declaration, spec.WriterSpec):
        _check_writer(declaration)
    for source in sources(declaration):
        spec.parse_source(source)
    for reference in references(declaration):
        module_name, colon, attribute = reference.partition(":")
        if not (colon and module_name and attribute):
            raise ValueError(f"reference {reference!r}: expected 'package.module:attribute'")
        if not _may_exist(module_name):
            raise ValueError(f"reference {reference!r}: there is no module {module_name!r}")


def _check_lora(declaration: spec.LoRASpec) -> None:
    if not (declaration.files or declaration.names):
        raise ValueError(f"{declaration.name!r} has neither files nor names; expected one, by which a LoRA is known")
    if not declaration.defaults:
        raise ValueError(f"{declaration.name!r} has no defaults; a LoRA that needs none is not declared")
    if wrong := [file for file in declaration.files if "://" in file]:
        raise ValueError(f"{declaration.name!r}: files has {wrong[0]!r}; expected 'owner/repository:pattern'")


def _check_evaluations(declaration: spec.SolverSpec) -> None:
    count = declaration.evaluations_per_step
    if count < 1:
        raise ValueError(f"{declaration.name!r}: evaluations_per_step={count!r}: expected an integer of at least 1")


def _check_tiny(declaration: spec.ModelSpec) -> None:
    for role in declaration.tiny:
        if role not in declaration.components:
            raise ValueError(
                f"{declaration.name!r}: tiny has {role!r}, no component"
                f"{did_you_mean(role, declaration.components) or '.'} "
                f"Its components: {', '.join(declaration.components)}"
            )


def _check_writer(declaration: spec.WriterSpec) -> None:
    suffix = declaration.suffix
    if suffix != "/" and not re.fullmatch(r"(\.[^\s./\\]+)+", suffix):
        raise ValueError(f"suffix {suffix!r}: expected a dot and a name, such as '.wav', or '/' for a folder")
    for name in ("kind", "writer"):
        if not getattr(declaration, name):
            raise ValueError(f"writer of {suffix!r}: {name} is empty")


def duplicates(declared: Iterable[Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (plugin, distribution, version, error text), four strings, for each of the declarations, all of one kind,
    whose name or suffix another one has, too, case ignored.
    """
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


_FOUND: set[str] = set()
"""Modules that exist: most of them are referred to many times."""


def _may_exist(module_name: str) -> bool:
    """Whether a module may exist: False only if its top-level package is imported and lacks it.

    Nothing is imported, so a module is looked up only if its top-level package is imported already; else True.
    """
    package, *rest = module_name.split(".")
    if package not in sys.modules or module_name in _FOUND:
        return True
    path = getattr(sys.modules[package], "__path__", None)
    name = package
    for part in rest:
        name = f"{name}.{part}"
        found = PathFinder.find_spec(name, path) if path is not None else None
        if found is None:
            return name in sys.modules
        path = found.submodule_search_locations
    _FOUND.add(module_name)
    return True
