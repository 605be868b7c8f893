"""Units that plugins add to somebody's pipeline. One that does not fit is left out and reported; the pipeline works."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.errors import InvalidPipeline, did_you_mean
from diffsynth.runtime.unit import REQUIRED, Unit, check_units
from diffsynth.spec import UnitSpec, resolve

if TYPE_CHECKING:
    from diffsynth.runtime.pipeline import Pipeline


def with_added_units(cls: type[Pipeline], given: Collection[str]) -> tuple[Unit, ...]:
    """The class's units and those that plugins add to it, each after the one it names.

    A unit that clashes with what is there, or whose code cannot be imported, is left out: one stranger's mistake must
    not take the pipeline from everybody. It becomes a problem of its plugin, see `registry.problems()`. Where two
    plugins clash with each other, the one whose name sorts first stays.

    Args:
        cls: the pipeline.
        given: names that it provides besides what units write.

    Raises:
        BrokenPlugin: a unit does not fit, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    references = {f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__}
    waiting = [declared for declared in _discovery.catalog().units if declared.spec.pipeline in references]
    units, failed = tuple(cls.units), dict[Declared[UnitSpec], Exception]()
    while waiting:
        failed = {}
        for declared in waiting:
            try:
                units = _added(cls, units, declared, given)
            except Exception as error:
                failed[declared] = error
        if len(failed) == len(waiting):  # otherwise one that was added may be what another waits for
            break
        waiting = list(failed)
    for declared, reason in failed.items():
        _report(cls, declared, reason)
    return units


def _added(
    cls: type[Pipeline], units: tuple[Unit, ...], declared: Declared[UnitSpec], given: Collection[str]
) -> tuple[Unit, ...]:
    step, after = resolve(declared.spec.unit), declared.spec.after
    if not isinstance(step, Unit):
        raise InvalidPipeline(f"{declared.spec.unit!r} is a {type(step).__name__}; expected a function under @unit")
    step = replace(step, provider=f"{declared.plugin} ({declared.distribution})")
    names = [each.name for each in units]
    if step.name in names:
        raise InvalidPipeline(f"{step.title} has the name of a unit that is there already. Give it another name")
    if after and after not in names:
        known = f"{did_you_mean(after, names)} {cls.__name__} has: {', '.join(names)}"
        raise InvalidPipeline(f"{step.title} runs after {after!r}, which is not there{known}")
    if unknown := set(step.roles) - set(cls.roles):
        raise InvalidPipeline(f"{step.title} uses role {sorted(unknown)}, not one of {list(cls.roles)}")
    place = names.index(after) + 1 if after else len(units)
    changed = (*units[:place], step, *units[place:])
    _check_arguments(step, units, changed, given)
    return changed


def _check_arguments(step: Unit, before: Sequence[Unit], after: Sequence[Unit], given: Collection[str]) -> None:
    """That the arguments which were there are there still, each with its type and default."""
    for read in step.reads:
        if read.name in given and read.default is not REQUIRED:
            raise InvalidPipeline(
                f"{step.title} declares {read.name!r}, which every pipeline has. Read it without a default"
            )
    kept = check_units(after, given).arguments
    for name in check_units(before, given).arguments:
        if name not in kept:
            raise InvalidPipeline(
                f"{step.title} writes {name!r} before its owner reads it, so that callers could not set it any more. "
                f"Read it too, or write another name"
            )


def _report(cls: type[Pipeline], declared: Declared[UnitSpec], error: Exception) -> None:
    text = str(error) if isinstance(error, InvalidPipeline) else f"{type(error).__name__}: {error}"
    _discovery.report(
        declared,
        f"unit {declared.spec.unit!r} is left out of {cls.__name__}: {text.rstrip('.')}. "
        f"Without the plugin: pip uninstall {declared.distribution}",
        cause=error,
    )
