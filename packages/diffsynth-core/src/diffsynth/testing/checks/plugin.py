"""Checks of a plugin as a whole: light imports, API version, loading, unique names, references, doors."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.resources
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffsynth import spec
from diffsynth._spec_checks import texts
from diffsynth.errors import InvalidPipeline
from diffsynth.testing.checks import light
from diffsynth.testing.checks.check import Check, Subject

LIGHT = "light modules import without torch"
API = "states the API version"
LOADS = "loads"
NAMES = "names are unique"
REFERENCES = "references resolve"

_LIGHT_FIELDS = ("config", "infer_config", "tiny", "tiny_inputs", "rules")


def checks(subject: Subject) -> Iterator[Check]:
    """Yield the five `Check` objects (named tests, not yet run) that apply to any plugin, and one for each of its
    `DoorSpec`s; if no plugin of the distribution loaded, only the first three, which show why.
    """
    yield Check(LIGHT, functools.partial(_is_light, subject))
    yield Check(API, functools.partial(_states_api, subject))
    yield Check(LOADS, functools.partial(_loads, subject), after=(LIGHT, API))
    if not subject.is_loaded:
        return
    yield Check(NAMES, functools.partial(_has_unique_names, subject), after=(LOADS,))
    yield Check(REFERENCES, functools.partial(_resolves, subject), after=(LOADS,))
    for door in subject.declared("doors"):
        yield Check(f"door {door.name} imports", functools.partial(_imports, door), after=(REFERENCES,))


def _is_light(subject: Subject) -> None:
    modules = list(subject.modules)
    for fact in (*subject.declared("architectures"), *subject.declared("checkpoints")):
        named = [getattr(fact, name) for name in _LIGHT_FIELDS if isinstance(getattr(fact, name, None), str)]
        modules += [reference.partition(":")[0] for reference in named if reference]
    found = light.heavy_imports(sorted(set(modules)))
    assert not found, f"{'; '.join(found)}. Import it inside the function that needs it, or name that code by string."


def _states_api(subject: Subject) -> None:
    wrong = [str(problem) for problem in subject.problems if "DIFFSYNTH_API" in problem.error]
    assert not wrong, "; ".join(wrong)


def _loads(subject: Subject) -> None:
    for problem in () if subject.is_loaded else subject.problems:
        failure = AssertionError(str(problem))
        failure.add_note(problem.traceback)
        raise failure


def _has_unique_names(subject: Subject) -> None:
    assert not subject.problems, "; ".join(map(str, subject.problems))


def _resolves(subject: Subject) -> None:
    faults = []
    for kind in _EXPECTED:
        for fact in subject.declared(kind):
            name = getattr(fact, "name", getattr(fact, "suffix", kind))
            faults += [f"{name}: {fault}" for fault in _faults(kind, fact)]
    known = {one.spec.name for one in subject.catalog.architectures}
    for fact in subject.declared("checkpoints"):
        if fact.architecture not in known:
            faults.append(f"{fact.name}: no installed plugin declares the architecture {fact.architecture!r}")
    if faults:
        raise SeveralFaults(faults)


class SeveralFaults(AssertionError):
    """Faults of one check that have nothing to do with each other; the message has one in each line.

    Args:
        faults: a text for each, in one line.
    """

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


def _faults(kind: str, fact: Any) -> Iterator[str]:
    for field, expected in _EXPECTED[kind].items():
        value = getattr(fact, field)
        for reference in texts(value):
            if not reference or (kind == "features" and field == "pipeline" and not is_installed(reference)):
                continue
            try:
                found = spec.resolve(reference)
            except InvalidPipeline:
                continue  # the reference resolves; another check reports what is wrong with the pipeline
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:  # the code of a plugin may raise anything
                plain = isinstance(error, ImportError | ValueError)
                yield f"{field}: {error}" if plain else f"{field}: {reference!r}: {type(error).__name__}: {error}"
                continue
            if not _is_a(expected, found):
                yield f"{field}: {reference!r} is {found!r:.60}; expected {expected}"


def is_installed(reference: str) -> bool:
    """Return whether the top-level package of `reference` is installed; it is `"a"` for the reference `"a.b:name"`.

    A feature may extend a pipeline that is not installed.
    """
    return importlib.util.find_spec(reference.partition(":")[0].partition(".")[0]) is not None


_EXPECTED: dict[str, dict[str, str]] = {
    "models": {"pipeline": "a Pipeline class", "tiny_inputs": "a function", "tiny_processors": "a function"},
    "architectures": {
        "module": "an nn.Module class",
        "config": "a frozen dataclass",
        "infer_config": "a function",
        "tiny": "anything",
        "tiny_inputs": "a function",
        "atomic": "an nn.Module class",
    },
    "checkpoints": {"rules": "a tuple of rules"},
    "layer_wrappers": {"layer": "an nn.Module class"},
    "attention": {"backend": "an attention backend", "workspace": "a function"},
    "solvers": {"solver": "a function"},
    "quantization": {"backend": "a function"},
    "training": {"pipeline": "a Pipeline class", "schedule": "a function"},
    "objectives": {"objective": "a class"},
    "features": {"pipeline": "a Pipeline class", "feature": "a Feature"},
    "commands": {"command": "a click.Command"},
    "guidance": {"guidance": "a Guidance class"},
    "writers": {"writer": "a function"},
    "loras": {"pipeline": "a Pipeline class"},
}
"""Kind of declaration -> its reference fields -> the kind of object that is expected."""


def _is_a(expected: str, found: Any) -> bool:
    import click
    from torch import nn

    from diffsynth.core.loader.convert import Rule
    from diffsynth.runtime.feature import Feature
    from diffsynth.runtime.guidance import Guidance
    from diffsynth.runtime.pipeline import Pipeline

    if expected == "a frozen dataclass":
        return isinstance(found, type) and dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if expected == "a tuple of rules":
        return isinstance(found, tuple) and all(isinstance(rule, Rule) for rule in found)
    classes = {"a Pipeline class": Pipeline, "an nn.Module class": nn.Module, "a Guidance class": Guidance}
    if expected in classes:
        return isinstance(found, type) and issubclass(found, classes[expected])
    instances = {"a Feature": Feature, "a click.Command": click.Command}
    if expected in instances:
        return isinstance(found, instances[expected])
    if expected == "an attention backend":
        return callable(found) and callable(getattr(found, "refuses", None))
    if expected == "a class":
        return isinstance(found, type)
    return callable(found) if expected == "a function" else True


def _imports(door: spec.DoorSpec) -> None:
    package, _, folder = door.folder.partition(":")
    path = Path(str(importlib.resources.files(package))) / folder
    names = sorted(file.stem for file in path.glob("*.py") if file.stem != "__init__")
    assert names, f"{door.folder}: {path} has no module"
    for name in names:
        importlib.import_module(f"diffsynth.pipelines.{name}")
