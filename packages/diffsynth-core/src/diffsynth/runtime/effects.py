"""Arguments of a call that have no effect on its result, such as a negative prompt where guidance is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.request import Request
from diffsynth.runtime.unit import Unit, equals_default, is_enabled, runs


def without_effect(pipe: PlannablePipeline, request: Request, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict argument -> reason, for those of the call that differ from their default and change nothing.

    They are the arguments that only a branch of guidance reads which the call does not compute, those of units that
    another argument turns on (`only_with`), and `guidance` where it is off.

    Args:
        pipe: the pipeline.
        request: the checked call.
        arguments: of the call, as the caller passed them.
    """
    program, defaults = pipe.program, pipe.__signature__.parameters
    found: dict[str, str] = {}
    # A subclass's `check()` may take arguments that the signature does not have.
    known = {name: value for name, value in arguments.items() if name in defaults}
    given = [name for name, value in known.items() if not equals_default(value, defaults[name].default)]
    running = [step for step in (*program.units, *program.outputs) if runs(step, pipe.components, request.values)]
    is_off = f"guidance is off (cfg_scale={request.loop.cfg_scale})"
    for name in given:
        if name == "guidance" and request.guidance.is_off(request.loop.cfg_scale):
            found[name] = is_off
        elif name not in program.arguments or any(name in _names(step, request) for step in running):
            continue
        elif any(name in names.values() for step in running for names in step.branches.values()):
            found[name] = is_off
        elif missing := [each.only_with for each in program.owners(name) if not is_enabled(each, request.values)]:
            found[name] = f"{missing[0]} is not given"
    return found


def _names(step: Unit, request: Request) -> set[str]:
    """Return the set of the names that a unit reads in the branches of a call."""
    renamed = {name for branch in request.branches for name in step.branches.get(branch, {}).values()}
    return {read.name for read in step.reads} | renamed
