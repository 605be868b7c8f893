"""Checks of the declarations of pipelines, of what the plugin adds to others' pipelines, of its models and of its
training. Nothing is called here; see `diffsynth.testing.checks.calls`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from diffsynth.errors import CheckpointError, InvalidPipeline, Unavailable, did_you_mean
from diffsynth.spec import ArchitectureSpec, FeatureSpec, ModelSpec, TrainingSpec, parse_source, resolve
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.plugin import NAMES, REFERENCES, is_installed

if TYPE_CHECKING:
    from diffsynth.runtime.feature import Feature


def checks(subject: Subject) -> Iterator[Check]:
    """Yield `Check` objects (named tests, not yet run): one for each pipeline that the plugin names in models or
    training; two for each installed pipeline that it extends; one for each feature for every pipeline; one or two for
    each model; one for each training declaration; and one for each architecture that is accepted as another one.
    """
    models, trainings, extended = subject.declared("models"), subject.declared("training"), extended_pipelines(subject)
    for pipeline in dict.fromkeys([fact.pipeline for fact in (*models, *trainings)] + extended):
        yield Check(units_of(pipeline), functools.partial(_is_consistent, pipeline), after=(REFERENCES,))
    for pipeline in extended:
        added = functools.partial(_has_what_is_added, pipeline, subject)
        yield Check(has_additions(pipeline), added, after=(units_of(pipeline),))
    for fact in subject.declared("features"):
        if fact.is_for_all:
            name = f"feature {fact.feature} fits a pipeline"
            yield Check(name, functools.partial(_fits_a_pipeline, fact, subject), after=(REFERENCES,))
    for model in models:
        fitting = functools.partial(_fits_its_pipeline, model)
        yield Check(fits(model.name), fitting, after=(units_of(model.pipeline),))
        if any(source.startswith("package://") for source in model.components.values()):
            packaged = functools.partial(_packaged_files_match, model, subject)
            yield Check(packaged_files_match(model.name), packaged, after=(fits(model.name), NAMES))
    for training in trainings:
        name = f"training of {training.pipeline} matches the pipeline"
        yield Check(name, functools.partial(_training_matches, training), after=(units_of(training.pipeline),))
    for fact in subject.declared("architectures"):
        if fact.accepted_as:
            name = f"{fact.name} has what roles of {' and '.join(fact.accepted_as)} need"
            yield Check(name, functools.partial(_has_what_roles_need, fact, subject), after=(REFERENCES, NAMES))


def extended_pipelines(subject: Subject) -> list[str]:
    """Return a list, without repetitions, of the references of installed pipelines that the plugin adds a feature to:
    those that its `FeatureSpec`s name, and those of the installed models of the families that they name.
    """
    models = [one.spec for one in subject.catalog.models]
    named = [
        pipeline
        for fact in subject.declared("features")
        for pipeline in (fact.pipeline, *(model.pipeline for model in models if model.family == fact.family))
    ]
    return [pipeline for pipeline in dict.fromkeys(named) if pipeline and is_installed(pipeline)]


def fits(name: str) -> str:
    """Return the name of the check of model `name` against its pipeline: `"model {name} fits its pipeline"`."""
    return f"model {name} fits its pipeline"


def packaged_files_match(name: str) -> str:
    """Return the name of the check of the files that model `name` ships: `"model {name} packaged files match their
    roles"`.
    """
    return f"model {name} packaged files match their roles"


def has_additions(pipeline: str) -> str:
    """Return the name of the check of what a plugin adds to a pipeline: `"additions to {pipeline} are there"`."""
    return f"additions to {pipeline} are there"


def units_of(pipeline: str) -> str:
    """Return the name of the check of a pipeline's units: `"units of {pipeline} are consistent"`."""
    return f"units of {pipeline} are consistent"


def _is_consistent(pipeline: str) -> None:
    from diffsynth.runtime.composition import compose

    cls = resolve(pipeline)
    cls.call_signature()
    cls(
        dict.fromkeys(compose(cls).roles), device="cpu"
    )  # building the pipeline checks what velocity() and the output units read


def _has_what_is_added(pipeline: str, subject: Subject) -> None:
    """Raise AssertionError if a feature that the plugin adds to a pipeline is left out of it, or one of its arguments
    is none of the call.
    """
    from diffsynth import registry
    from diffsynth.runtime.composition import PIPELINE_VALUES, compose

    made = compose(resolve(pipeline))
    earlier = {str(problem) for problem in subject.problems}  # those of discovery; another check reports them
    late = [str(problem) for problem in registry.problems() if problem.distribution == subject.distribution]
    left_out = [problem for problem in late if problem not in earlier]
    assert not left_out, "; ".join(left_out)
    added = [feature for feature in made.features if feature.provider.endswith(f"({subject.distribution})")]
    known = {*made.program.arguments, *made.program.writes, *PIPELINE_VALUES, *made.facts}
    missing = sorted({name for feature in added for name in _promised_arguments(feature)} - known)
    assert not missing, f"{', '.join(missing)}: declared, but no argument of {pipeline}"


def _promised_arguments(feature: Feature) -> Iterator[str]:
    """Yield the names of the arguments that a feature lists, and of those that its units read with a default."""
    from diffsynth.runtime.unit import REQUIRED

    yield from getattr(feature.arguments, "__annotations__", ())
    for step in (*feature.units, *feature.outputs):
        yield from (read.name for read in step.reads if read.default is not REQUIRED)


def _fits_a_pipeline(fact: FeatureSpec, subject: Subject) -> None:
    """Raise AssertionError if a feature for every pipeline fits none of those of the installed models; Unavailable
    without any model.
    """
    from diffsynth.runtime.composition import compose

    name = resolve(fact.feature).name
    pipelines = sorted({one.spec.pipeline for one in subject.catalog.models})
    if not pipelines:
        raise Unavailable("no model is installed whose pipeline could have the feature")
    for pipeline in pipelines:
        with suppress(ImportError, InvalidPipeline):  # the fault of another plugin
            if any(feature.name == name and feature.provider for feature in compose(resolve(pipeline)).features):
                return
    raise AssertionError(
        f"feature {name!r} fits no installed pipeline: none of {', '.join(pipelines)} has what it reads"
    )


def _fits_its_pipeline(model: ModelSpec) -> None:
    from diffsynth import Role
    from diffsynth.runtime.composition import compose
    from diffsynth.runtime.role import role_of

    cls = resolve(model.pipeline)
    roles = compose(cls).roles
    faults = [
        f"{role!r} is not a role{did_you_mean(role, roles)}"
        for role in (*model.components, *model.processors)
        if role_of(role) not in roles
    ]
    needed = [name for name, role in roles.items() if isinstance(role, Role) and not role.optional]
    faults += [f"no component for role {name!r}" for name in needed if name not in model.components]
    arguments = cls.call_signature().parameters
    faults += [
        f"default {name!r} is not an argument{did_you_mean(name, arguments)}"
        for name in model.defaults
        if name not in arguments
    ]
    assert not faults, f"{model.pipeline}: {'; '.join(faults)}"


def _packaged_files_match(model: ModelSpec, subject: Subject) -> None:
    """Raise AssertionError unless each weight file that a model ships in its package exists, is recognised and has the
    architecture that its role (name of a component) takes.

    No tensor is read.
    """
    from diffsynth import ModelConfig
    from diffsynth.core.loader import component, convert, recognize
    from diffsynth.core.loader.checkpoint import read_config
    from diffsynth.runtime.composition import compose
    from diffsynth.runtime.role import role_of

    roles = compose(resolve(model.pipeline)).roles
    for role, source in model.components.items():
        if parse_source(source).scheme != "package":
            continue
        try:
            tensors = read_config(ModelConfig.from_source(source))
            (found,) = recognize.recognize(tensors, *subject.catalog.layouts())
            module = component.build(found.architecture, found.config)
            wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
            convert.check(convert.plan(found.rules, tensors.shapes), wanted, where=source)
        except CheckpointError as error:
            raise AssertionError(f"{role}: {source}: {error}") from error
        need = roles[role_of(role)]
        assert need.accepts(found.architecture), (
            f"{role}: {source} is a {found.architecture.name}; expected one of {need.architectures}"
        )


def _training_matches(training: TrainingSpec) -> None:
    cls = resolve(training.pipeline)
    faults = [f"trainable {role!r} is not a role" for role in training.trainable if role not in cls.roles]
    faults += [
        f"lora_targets: {role!r} is not trainable" for role in training.lora_targets if role not in training.trainable
    ]
    arguments = cls.call_signature().parameters
    faults += [f"data: {name!r} is not an argument" for name in training.data.values() if name not in arguments]
    assert not faults, f"{training.pipeline}: {'; '.join(faults)}"


def _has_what_roles_need(fact: ArchitectureSpec, subject: Subject) -> None:
    """Raise AssertionError unless the names in `accepted_as` are architectures, and the module has the methods and
    config fields that the installed models' pipelines need in each role that accepts one of them.
    """
    known = [one.spec.name for one in subject.catalog.architectures]
    for name in fact.accepted_as:
        assert name in known, (
            f"accepted_as: {name!r} is no architecture of an installed plugin{did_you_mean(name, known) or '.'} "
            "Install the package that declares it"
        )
    from diffsynth import Role
    from diffsynth.runtime.composition import compose
    from diffsynth.runtime.role import fields_read

    module, config = resolve(fact.module), resolve(fact.tiny)
    faults = []
    for pipeline in sorted({one.spec.pipeline for one in subject.catalog.models}):
        try:
            made = compose(resolve(pipeline))
        except (ImportError, InvalidPipeline):
            continue  # the fault of another plugin
        for role, need in made.roles.items():
            if isinstance(need, Role) and need.accepts(fact):
                lacking = need.lacks(module, config, fields=fields_read(role, made.facts))
                faults += [f"role {role!r} of {pipeline} needs {each}" for each in lacking]
    assert not faults, f"{'; '.join(faults)}, which {fact.module} lacks"
