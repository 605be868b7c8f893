"""Checks of calls of models with tiny components: which models are called, by which checks, in which order.

Every model has the checks of one call. The first of each set of architectures of a pipeline has those of further calls,
too, because the networks of the others differ in weights and sizes only. The first of each pipeline, if it is a model
of the plugin, has those of wrong arguments and of the smallest limit. What each check does is in
`diffsynth.testing.checks.model_checks`.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth._discovery import Declared
from diffsynth.spec import ModelSpec, resolve
from diffsynth.testing.checks.architectures import config_inferred, no_meta_after_loading, runs
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.layouts import recognized_by_structure
from diffsynth.testing.checks.lora import supports_lora
from diffsynth.testing.checks.pipelines import extended_pipelines, fits, has_additions, packaged_files_match
from diffsynth.testing.checks.plugin import NAMES
from diffsynth.testing.checks.wrapping import is_equal_wrapped

if TYPE_CHECKING:
    from diffsynth.testing.checks.tiny_model import TinyModel


def checks(subject: Subject) -> Iterator[Check]:
    """Yield `Check` objects (named tests, not yet run) for each model of the plugin, and for one model of each pipeline
    that the plugin extends: 6 for every model, 8 more for the first of each set of architectures, and 2 more for the
    first of each pipeline of the plugin's own models.
    """
    models, pipelines, networks = _LoadedModel(), set(), set()
    for declared in models_to_call(subject):
        pipeline = declared.spec.pipeline
        used = pipeline, frozenset(_architectures(declared.spec, subject).items())
        is_own = declared.distribution == subject.distribution
        is_first = {"is_first": used not in networks, "is_first_of_pipeline": is_own and pipeline not in pipelines}
        pipelines.add(pipeline)
        networks.add(used)
        first = fits(declared.spec.name) if is_own else has_additions(pipeline)
        obeying = functools.partial(_obeys_schema, declared.spec)
        yield Check(defaults_obey(declared.spec.name), obeying, after=(first,))
        for title, function, needed in _cases(declared.spec.name, _Requirements.of(declared, subject), **is_first):
            run = functools.partial(_run, function, models, declared)
            yield Check(title, run, tuple(needed), runs_network=True)


def models_to_call(subject: Subject) -> list[Declared[ModelSpec]]:
    """Return a list of the models of the plugin, and the first model of each installed pipeline that it extends, unless
    one of its own has that pipeline.
    """
    own = [one for one in subject.catalog.models if one.distribution == subject.distribution]
    pipelines = {one.spec.pipeline for one in own}
    for pipeline in extended_pipelines(subject):
        others = [one for one in subject.catalog.models if one.spec.pipeline == pipeline]
        if pipeline not in pipelines and others:
            own.append(others[0])
    return own


@dataclass(frozen=True)
class _Requirements:
    """Names of the checks of a model's parts, which its calls depend on.

    Args:
        loading: of declarations, files and networks.
        offloading: of networks under memory policies.
        loras: of networks with LoRAs.
    """

    loading: tuple[str, ...]
    offloading: tuple[str, ...]
    loras: tuple[str, ...]

    @classmethod
    def of(cls, declared: Declared[ModelSpec], subject: Subject) -> _Requirements:
        """Return the `_Requirements` of a model: the checks of `subject` about its pipeline, networks and layouts."""
        model = declared.spec
        if declared.distribution != subject.distribution:
            return cls((has_additions(model.pipeline),), (), ())
        used, files = _architectures(model, subject), {*model.components.values()}
        own = [fact for fact in subject.declared("architectures") if {fact.name, ""} & {*used.values()}]
        layouts = [fact for fact in subject.declared("checkpoints") if fact.layout and files & {*fact.files}]
        loading = [fits(model.name), NAMES]
        loading += [check(fact.name) for fact in own for check in (no_meta_after_loading, runs, config_inferred)]
        loading += [recognized_by_structure(fact.name) for fact in layouts]
        if any(source.startswith("package://") for source in files):
            loading.append(packaged_files_match(model.name))
        offloading = tuple(is_equal_wrapped(fact.name) for fact in own)
        return cls(tuple(loading), offloading, tuple(supports_lora(fact.name) for fact in own if fact.lora_targets))


def _architectures(model: ModelSpec, subject: Subject) -> dict[str, str]:
    """Return a dict role -> name of the architecture of its component; "" if no checkpoint lists the file. Nothing is
    imported or read.
    """
    listed = {file: one.architecture for one in subject.catalog.layouts()[1] for file in one.files}
    return {role: listed.get(file, "") for role, file in model.components.items()}


def _cases(
    name: str, after: _Requirements, *, is_first: bool, is_first_of_pipeline: bool
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Yield (title, name of a function of `model_checks`, names of the checks that it depends on) for each check of
    model `name`: those of one call; if `is_first`, those of further calls; if `is_first_of_pipeline`, too, those of
    wrong arguments and of the smallest limit.
    """
    loaded, called = f"model {name} loads from tiny files", f"model {name} can be called"
    velocity, seeds = f"model {name} velocity() fits its latents", f"model {name} results depend on the seed alone"
    planned, steps = f"model {name} can be planned", f"model {name} steps from noise to data"
    result, defaults = f"model {name} result is finite and of its size", defaults_obey(name)
    yield loaded, "is_loaded", after.loading
    yield called, "can_be_called", (loaded,)
    yield velocity, "has_correct_velocity", (called,)
    yield steps, "has_correct_steps", (velocity,)
    yield result, "has_correct_result", (velocity,)
    if not is_first:
        return
    yield f"model {name} makes several results of another size", "makes_several", (result, steps)
    yield seeds, "depends_on_seed", (velocity,)
    yield f"model {name} defaults are neutral", "has_neutral_defaults", (seeds, defaults)
    yield f"model {name} can be cancelled", "can_be_cancelled", (called,)
    yield f"model {name} can be called from two threads", "supports_threads", (seeds,)
    yield planned, "can_be_planned", (called, *after.offloading)
    yield f"model {name} result is the same offloaded", "is_equal_offloaded", (seeds, result, *after.offloading)
    yield f"model {name} supports LoRAs", "supports_loras", (seeds, *after.loras)
    if is_first_of_pipeline:
        yield f"model {name} refuses wrong arguments", "refuses_wrong_arguments", (called,)
        smallest = f"model {name} can be planned with the smallest limit"
        yield smallest, "can_be_planned_with_the_smallest_limit", (planned,)


def defaults_obey(name: str) -> str:
    """Return the name of the check of the defaults of model `name`: `"model {name} defaults obey the schema"`."""
    return f"model {name} defaults obey the schema"


def _obeys_schema(model: ModelSpec) -> None:
    """Raise AssertionError unless the default of each argument is a value that the argument's own schema allows."""
    from diffsynth.runtime.schema import describe
    from diffsynth.testing.checks.records import schema_refusal

    schema = describe(resolve(model.pipeline), title=model.name, defaults=model.defaults)
    for name, described in schema["properties"].items():
        if "default" in described and (error := schema_refusal(schema, name, described["default"])) is not None:
            raise AssertionError(f"the default of {name} does not obey its schema: {error}")


def _run(function: str, models: _LoadedModel, declared: Declared[ModelSpec]) -> None:
    from diffsynth.testing.checks import model_checks

    getattr(model_checks, function)(models.get(declared))


class _LoadedModel:
    """The model asked for last, which stays loaded, since the checks of one model follow each other."""

    def __init__(self) -> None:
        self._latest: tuple[Declared[ModelSpec], TinyModel] | None = None

    def get(self, declared: Declared[ModelSpec]) -> TinyModel:
        """Return the model as a `TinyModel`, loaded anew unless it is the one asked for last; see `TinyModel`."""
        from diffsynth.testing.checks.tiny_model import TinyModel

        if self._latest is None or self._latest[0] is not declared:
            self._latest = None  # its memory is freed first
            self._latest = declared, TinyModel(declared, self._folder)
        return self._latest[1]

    @functools.cached_property
    def _folder(self) -> Path:
        """Path of a temporary tiny hub, which is removed together with this object."""
        folder = tempfile.mkdtemp(prefix="diffsynth-tiny-hub-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)
