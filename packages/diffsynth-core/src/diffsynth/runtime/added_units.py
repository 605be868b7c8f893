"""Units that plugins add to a pipeline of another package. A unit that does not fit is left out and reported."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.errors import InvalidPipeline, did_you_mean
from diffsynth.runtime.unit import REQUIRED, Unit, check_units
from diffsynth.spec import UnitSpec, resolve


def with_added_units(
    cls: type, units: Sequence[Unit], *, roles: Collection[str], provided: Collection[str]
) -> tuple[Unit, ...]:
    """Return a tuple of `units` and the fitting units that plugins add to `cls`, each after the one it names, else
    last.

    A unit that clashes with another, or whose code cannot be imported, is left out and becomes a problem of its plugin,
    see `registry.problems()`: the mistake of one plugin must not take the pipeline from its users. Of two plugins that
    clash with each other, the one whose name sorts first stays.

    Args:
        cls: the pipeline class; units added to a base class are included.
        units: its own units.
        roles: its roles.
        provided: the names that it sets besides those that units write.

    Raises:
        BrokenPlugin: a unit does not fit, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    references = {f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__}
    pending = [declared for declared in _discovery.catalog().units if declared.spec.pipeline in references]
    units, failed = tuple(units), dict[Declared[UnitSpec], Exception]()
    while pending:
        failed = {}
        for declared in pending:
            try:
                step = _added_unit(declared, units, roles, cls.__name__)
                changed = _inserted(step, declared.spec.after, units)
                _check_arguments(step, units, changed, provided)
                units = changed
            except Exception as error:
                failed[declared] = error
        if len(failed) == len(pending):  # otherwise a unit that was added may be the one that a failed unit needs
            break
        pending = list(failed)
    for declared, reason in failed.items():
        _report(cls, declared, reason)
    return units


def _added_unit(
    declared: Declared[UnitSpec], units: tuple[Unit, ...], roles: Collection[str], pipeline_name: str
) -> Unit:
    """Import and return the `Unit` that a plugin adds; raise InvalidPipeline if its name, roles or place do not fit."""
    step, after = resolve(declared.spec.unit), declared.spec.after
    if not isinstance(step, Unit):
        raise InvalidPipeline(f"{declared.spec.unit!r} is a {type(step).__name__}; expected a function under @unit")
    step = replace(step, provider=f"{declared.plugin} ({declared.distribution})")
    names = [each.name for each in units]
    if step.name in names:
        raise InvalidPipeline(f"{step.title} has the name of a unit that is there already. Give it another name")
    if after and after not in names:
        known = f"{did_you_mean(after, names)} {pipeline_name} has: {', '.join(names)}"
        raise InvalidPipeline(f"{step.title} runs after {after!r}, which is not there{known}")
    if unknown := set(step.roles) - set(roles):
        raise InvalidPipeline(f"{step.title} uses role {sorted(unknown)}, not one of {list(roles)}")
    return step


def _inserted(step: Unit, after: str | None, units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    index = [each.name for each in units].index(after) + 1 if after else len(units)
    return (*units[:index], step, *units[index:])


def _check_arguments(step: Unit, before: Sequence[Unit], after: Sequence[Unit], provided: Collection[str]) -> None:
    """Raise InvalidPipeline if an added unit removes an argument of the pipeline, or gives a default to a name that
    every pipeline sets.
    """
    for read in step.reads:
        if read.name in provided and read.default is not REQUIRED:
            raise InvalidPipeline(
                f"{step.title} declares {read.name!r}, which every pipeline has. Read it without a default"
            )
    remaining = check_units(after, provided).arguments
    for name in check_units(before, provided).arguments:
        if name not in remaining:
            raise InvalidPipeline(
                f"{step.title} writes {name!r} before its owner reads it, so that callers could not set it any more. "
                f"Read it too, or write another name"
            )


def _report(cls: type, declared: Declared[UnitSpec], error: Exception) -> None:
    text = str(error) if isinstance(error, InvalidPipeline) else f"{type(error).__name__}: {error}"
    _discovery.report(
        declared,
        f"unit {declared.spec.unit!r} is left out of {cls.__name__}: {text.rstrip('.')}. "
        f"Without the plugin: pip uninstall {declared.distribution}",
        cause=error,
    )
