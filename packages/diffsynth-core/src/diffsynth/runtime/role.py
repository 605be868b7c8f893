"""Roles: the names under which a pipeline holds its components, what may fill them, and whether its units fit them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.errors import InvalidPipeline, MissingComponent, did_you_mean
from diffsynth.runtime.unit import REQUIRED, Program

if TYPE_CHECKING:
    from diffsynth.runtime.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Role:
    """A module: any of these architectures may fill it. An optional one may stay empty."""

    architectures: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Processor:
    """A tokenizer or processor that comes as a folder.

    Args:
        source: where it is unless `from_pretrained(<role>_config=...)` says otherwise.
        loader: reference to a class with `from_pretrained(folder)`.
        optional: may stay empty.
    """

    source: str
    loader: str = "transformers:AutoTokenizer"
    optional: bool = False


def fill_roles(cls: type[Pipeline], components: Mapping[str, Any]) -> dict[str, Any]:
    """A component, or None, for every role.

    Raises:
        TypeError: a role that the pipeline does not have.
        MissingComponent: one that is not optional is left out.
    """
    for role in components:
        if role not in cls.roles:
            raise TypeError(
                f"{cls.__name__} has no role {role!r}{did_you_mean(role, cls.roles)} Its roles: {', '.join(cls.roles)}"
            )
    missing = [role for role, need in cls.roles.items() if not need.optional and role not in components]
    if missing:
        raise MissingComponent(
            f"{cls.__name__} needs {' and '.join(missing)}; loaded: {', '.join(components) or 'nothing'}. "
            f"Add the file to model_configs."
        )
    return {role: components.get(role) for role in cls.roles}


def check_program(cls: type[Pipeline], program: Program, given: Collection[str]) -> None:
    """Check that roles are there and that every name is written by somebody before it is read.

    Args:
        cls: the pipeline.
        program: its units, those of plugins included.
        given: names that every pipeline gives its units.

    Raises:
        InvalidPipeline: naming the unit.
    """
    for step in (*program.units, *cls.output_units):
        if unknown := {*step.roles, *step.requires} - set(cls.roles):
            raise InvalidPipeline(f"unit {step.name!r} uses role {sorted(unknown)}, not one of {list(cls.roles)}")
    for name, place in cls.facts.items():
        if place.partition(".")[0] not in cls.roles:
            raise InvalidPipeline(f"fact {name!r} is {place!r}; expected role.field with one of {list(cls.roles)}")
    available = program.writes | set(program.arguments) | set(given) | set(cls.facts)
    reads = {"velocity()": cls.conditions(required_only=True), "the loop": {"latents", "sigmas"}}
    for step in cls.output_units:
        reads[f"unit {step.name!r}"] = {read.name for read in step.reads if read.default is REQUIRED}
        available |= set(step.writes)
    for reader, names in reads.items():
        for name in sorted(names - available):
            raise InvalidPipeline(
                f"{reader} of {cls.__name__} reads {name!r}, which no unit writes{did_you_mean(name, available)}"
            )
