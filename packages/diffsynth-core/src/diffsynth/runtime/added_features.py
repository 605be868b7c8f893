"""Features that plugins add to pipelines of other packages. A feature that does not fit is left out and reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.errors import InvalidPipeline
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.unit import REQUIRED, Program
from diffsynth.spec import FeatureSpec, resolve


def with_added_features(
    cls: type, features: Sequence[Feature], compose: Callable[[Sequence[Feature]], Program]
) -> tuple[Feature, ...]:
    """Return a tuple of `features` and, after them, the fitting features that plugins add to `cls`.

    A feature that clashes with another, or whose code cannot be imported, is left out and becomes a problem of its
    plugin, see `registry.problems()`: the mistake of one plugin must not take the pipeline from its users. Of two
    plugins that clash with each other, the one whose name sorts first stays. A feature for every pipeline is added to
    those that have what it reads, and is no problem for the others.

    Args:
        cls: the pipeline class; features added to a base class are included.
        features: its own features.
        compose: from features to the checked program of the class with them; raises InvalidPipeline if one misfits.

    Raises:
        BrokenPlugin: a feature does not fit, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    pending = [declared for declared in _discovery.catalog().features if _is_for(declared.spec, cls)]
    features = tuple(features)
    if not pending:
        return features
    program = compose(features)
    failed: dict[Declared[FeatureSpec], Exception] = {}
    while pending:
        failed = {}
        for declared in pending:
            try:
                added = _added_feature(declared, features)
                changed = compose((*features, added))
                _check_arguments(added, program, changed)
                features, program = (*features, added), changed
            except Exception as error:
                failed[declared] = error
        if len(failed) == len(pending):  # otherwise a feature that was added may be the one that a failed one needs
            break
        pending = list(failed)
    for declared, reason in failed.items():
        if not (declared.spec.is_for_all and isinstance(reason, InvalidPipeline)):
            _report(cls, declared, reason)
    return features


def _is_for(spec: FeatureSpec, cls: type) -> bool:
    if spec.is_for_all:
        return True
    references = {f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__}
    if spec.pipeline:
        return spec.pipeline in references
    models = (declared.spec for declared in _discovery.catalog().models)
    return any(model.family == spec.family and model.pipeline in references for model in models)


def _added_feature(declared: Declared[FeatureSpec], features: Sequence[Feature]) -> Feature:
    """Import and return the `Feature` that a plugin adds, with the plugin's name; raise InvalidPipeline if it is none,
    or if its name is taken.
    """
    feature = resolve(declared.spec.feature)
    if not isinstance(feature, Feature):
        raise InvalidPipeline(f"{declared.spec.feature!r} is a {type(feature).__name__}; expected a Feature")
    provider = f"{declared.plugin} ({declared.distribution})"
    units, outputs = (
        tuple(replace(step, provider=provider) for step in steps) for steps in (feature.units, feature.outputs)
    )
    feature = replace(feature, provider=provider, units=units, outputs=outputs)
    if feature.name in [each.name for each in features]:
        raise InvalidPipeline(f"{feature.title} has the name of a feature that is there already. Give it another name")
    return feature


def _check_arguments(feature: Feature, before: Program, after: Program) -> None:
    """Raise InvalidPipeline if an added feature removes an argument of the pipeline, gives a default to a name that
    every pipeline sets, or has a unit whose name is taken.
    """
    names = [step.name for step in (*before.units, *before.outputs)]
    for step in (*feature.units, *feature.outputs):
        if step.name in names:
            raise InvalidPipeline(f"{step.title} has the name of a unit that is there already. Give it another name")
        for read in step.reads:
            if read.default is not REQUIRED and read.name not in after.arguments and read.name not in after.writes:
                raise InvalidPipeline(
                    f"{step.title} declares {read.name!r}, which every pipeline has. Read it without a default"
                )
    for name in before.arguments:
        if name not in after.arguments:
            raise InvalidPipeline(
                f"{feature.title} writes {name!r} before its owner reads it, so that callers could not set it any "
                f"more. Read it too, or write another name"
            )


def _report(cls: type, declared: Declared[FeatureSpec], error: Exception) -> None:
    text = str(error) if isinstance(error, InvalidPipeline) else f"{type(error).__name__}: {error}"
    _discovery.report(
        declared,
        f"feature {declared.spec.feature!r} is left out of {cls.__name__}: {text.rstrip('.')}. "
        f"Without the plugin: {_discovery.removal(declared)}",
        cause=error,
    )
