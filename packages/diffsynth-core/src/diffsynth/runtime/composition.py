"""The composition of a pipeline class: its units, roles and conditions, and those of its features and of plugins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth.errors import InvalidPipeline, did_you_mean
from diffsynth.runtime.added_features import with_added_features
from diffsynth.runtime.feature import Condition, Feature
from diffsynth.runtime.request import LOOP_NAMES, LOOP_VALUES
from diffsynth.runtime.role import Agreement, Processor, Role
from diffsynth.runtime.unit import Program, check_units, in_phases

PIPELINE_VALUES = ("device", "dtype", "batch_size", "seeds", "mesh", *LOOP_NAMES)
"""The names that every pipeline sets for its units."""

RESERVED = ("step", "extensions")
"""The parameters of `velocity()` that are no conditions."""


@dataclass(frozen=True)
class Composition:
    """A pipeline class together with its features.

    Args:
        features: the class's own, and then those that plugins add, in order.
        roles: role -> `Role` or `Processor`.
        facts: name -> "role.field".
        agreements: the config fields that must be equal.
        per_image: names of the arguments that take one value, or a list of one for each result.
        loop_roles: the roles whose networks the loop may call.
        parameters: names of the keyword-only parameters of `velocity()`, reserved ones included.
        conditions: name -> `Condition` of all values that `velocity()` reads.
        program: the units.
        has_loop: whether there is a denoising loop.
    """

    features: tuple[Feature, ...]
    roles: dict[str, Role | Processor]
    facts: dict[str, str]
    agreements: tuple[Agreement, ...]
    per_image: tuple[str, ...]
    loop_roles: tuple[str, ...]
    parameters: frozenset[str]
    conditions: dict[str, Condition]
    program: Program
    has_loop: bool


def compose(cls: Any) -> Composition:
    """Return the checked `Composition` of a pipeline class; a feature of a plugin that does not fit is left out.

    Args:
        cls: a subclass of `Pipeline`.

    Raises:
        InvalidPipeline: units, roles, facts, conditions and `velocity()` of the class do not fit together; the message
            names the unit or feature.
        BrokenPlugin: a feature of a plugin does not fit, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    return _compose(cls, with_added_features(cls, cls.features, lambda features: _compose(cls, features).program))


def own_program(cls: Any) -> Program:
    """Return the `Program` of a class's own units and features, before roles and conditions are checked.

    Raises:
        InvalidPipeline: units do not fit together.
    """
    return _program(cls, cls.features)


def own_roles(cls: Any) -> dict[str, Role | Processor]:
    """Return a dict role -> `Role` or `Processor` of a class and its own features.

    Raises:
        InvalidPipeline: two of them declare one role in different ways.
    """
    return _joined("roles", cls, cls.features)


def _compose(cls: Any, features: Sequence[Feature]) -> Composition:
    made = Composition(
        features=tuple(features),
        roles=_joined("roles", cls, features),
        facts=_joined("facts", cls, features),
        agreements=(*cls.agreements, *(agreement for each in features for agreement in each.agreements)),
        per_image=tuple(dict.fromkeys((*cls.per_image, *(name for each in features for name in each.per_image)))),
        loop_roles=tuple(dict.fromkeys((*cls.loop_roles, *(role for each in features for role in each.loop_roles)))),
        parameters=frozenset(_condition_parameters(cls)),
        conditions=_conditions(cls, features),
        program=_program(cls, features),
        has_loop=cls.has_loop(),
    )
    _check_roles(cls, made)
    if made.has_loop:
        _check_loop(cls, made)
    return made


def _program(cls: Any, features: Sequence[Feature]) -> Program:
    units = in_phases([*cls.units, *(step for each in features for step in each.units)])
    outputs = (*cls.output_units, *(step for each in features for step in each.outputs))
    return check_units(units, (*PIPELINE_VALUES, *_joined("facts", cls, features)), outputs)


def _joined(field: str, cls: Any, features: Sequence[Feature]) -> dict[str, Any]:
    """Return a dict of the entries of a mapping of the class and of its features; raise InvalidPipeline if two declare
    one name in different ways.
    """
    found = dict(getattr(cls, field))
    for feature in features:
        for name, value in getattr(feature, field).items():
            if name in found and found[name] != value:
                raise InvalidPipeline(
                    f"{feature.title} of {cls.__name__} declares {name!r} in its {field} as {value!r}, unlike "
                    f"{found[name]!r}. Give it another name"
                )
            found[name] = value
    return found


def _conditions(cls: Any, features: Sequence[Feature]) -> dict[str, Condition]:
    declared = _joined("conditions", cls, features)
    if not cls.has_loop():
        return declared
    others = [name for name in _condition_parameters(cls) if name not in (*declared, *RESERVED)]
    return {**dict.fromkeys(others, Condition()), **declared}


def _condition_parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    """Return a mapping name -> `inspect.Parameter` of the keyword-only parameters of a class's `velocity()`, or of its
    `predict()`.
    """
    function: Callable[..., Any] = cls.velocity if cls.prediction == "velocity" else cls.predict
    parameters = inspect.signature(function).parameters
    return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


def _check_roles(cls: Any, made: Composition) -> None:
    for step in (*made.program.units, *made.program.outputs):
        if unknown := {*step.roles, *step.requires} - set(made.roles):
            raise InvalidPipeline(f"{step.title} uses role {sorted(unknown)}, not one of {list(made.roles)}")
    for name, path in made.facts.items():
        if path.partition(".")[0] not in made.roles:
            raise InvalidPipeline(f"fact {name!r} is {path!r}; expected role.field with one of {list(made.roles)}")
    for path in (path for agreement in made.agreements for path in agreement.fields):
        if path.partition(".")[0] not in made.roles:
            raise InvalidPipeline(f"an agreement has {path!r}; expected role.field with one of {list(made.roles)}")


def _check_loop(cls: Any, made: Composition) -> None:
    """Raise InvalidPipeline for a condition that `velocity()` does not take, or a name that it or the loop needs and
    nothing sets.
    """
    parameters = _condition_parameters(cls)
    extra = [name for name in made.conditions if name not in parameters]
    if extra and "extensions" not in parameters:
        owner = next((each.title for each in made.features if extra[0] in each.conditions), "the class")
        raise InvalidPipeline(
            f"{owner} declares the condition {extra[0]!r}, and velocity() of {cls.__name__} does not take it"
            f"{did_you_mean(extra[0], parameters)} Name it as a parameter, or add the parameter extensions"
        )
    available = made.program.writes | set(made.program.arguments) | set(PIPELINE_VALUES) | set(made.facts)
    for name in extra:
        if name not in available:
            raise InvalidPipeline(f"the condition {name!r} of {cls.__name__} is written by no unit")
    required = {name for name, each in parameters.items() if each.default is each.empty} - set(RESERVED)
    for reader, names in {"velocity()": required, "the loop": LOOP_VALUES}.items():
        for name in sorted(names - available):
            raise InvalidPipeline(
                f"{reader} of {cls.__name__} reads {name!r}, which no unit writes{did_you_mean(name, available)}"
            )
