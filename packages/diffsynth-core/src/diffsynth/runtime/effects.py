"""Arguments of a call that have no effect on its result, such as a negative prompt where guidance is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsynth.runtime.branch_lora import ARGUMENTS
from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.request import LOOP_VALUES, Request
from diffsynth.runtime.solvers import find_solver
from diffsynth.runtime.unit import Unit, equals_default, is_enabled, runs


def without_effect(pipe: PlannablePipeline, request: Request, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict argument -> reason, for those of the call that differ from their default and change nothing.

    They are the arguments that only a branch of guidance reads which the call does not compute, those of units that
    another argument turns on (`only_with`), those that all units ignore (`Unit.ignores`), those of units that make an
    output of latents that the call returns as they are, those of units whose results only such units read, and
    `guidance` where it is off.

    Args:
        pipe: the pipeline.
        request: the checked call.
        arguments: of the call, as the caller passed them.
    """
    defaults, reads = pipe.__signature__.parameters, _Reads(pipe, request)
    found: dict[str, str] = {}
    # A subclass's `check()` may take arguments that the signature does not have.
    known = {name: value for name, value in arguments.items() if name in defaults}
    given = [name for name, value in known.items() if not equals_default(value, defaults[name].default)]
    is_off = f"guidance is off (cfg_scale={request.loop.cfg_scale})"
    for name in given:
        if name in ("guidance", ARGUMENTS[1]) and request.guidance.is_off(request.loop.cfg_scale):
            found[name] = is_off
        elif name == "seed" and not find_solver(request.loop.solver).uses_noise:
            found[name] = reads.ignored("seeds") or ""
        elif name not in pipe.program.arguments:
            continue
        elif reads.of(name):
            found[name] = reads.unused(name) or reads.ignored(name) or ""
        elif any(name in names.values() for step in reads.running for names in step.branches.values()):
            found[name] = is_off
        else:
            found[name] = reads.unread(name)
    return {name: reason for name, reason in found.items() if reason}


def arguments_read(pipe: PlannablePipeline, request: Request) -> set[str]:
    """Return the set of the names of arguments that units of a call read and that change its result."""
    reads = _Reads(pipe, request)
    return {name for name in pipe.program.arguments if reads.of(name) and not reads.ignored(name)}


class _Reads:
    """The units that read a name in a call, and whether its value changes anything.

    Args:
        pipe: the pipeline.
        request: the checked call.
    """

    def __init__(self, pipe: PlannablePipeline, request: Request) -> None:
        program, components, values = pipe.program, pipe.components, pipe.known_values(request)
        self._program, self._request, self._conditions = program, request, pipe.condition_rules
        self._outputs = [step for step in program.outputs if runs(step, components, values)]
        self.running = [step for step in program.units if runs(step, components, values)]
        if request.loop.output_type != "latents":
            self.running += self._outputs
        self._ignored = {step.name: step.ignores(values) for step in self.running if step.ignores is not None}

    def of(self, name: str) -> list[Unit]:
        """Return a list of the units that run and read a name in a branch of the call."""
        return [step for step in self.running if name in _names(step, self._request)]

    def unread(self, name: str) -> str:
        """Return the reason why no unit reads a name in the call, as text; "" if a unit does, or none would in any."""
        if self.of(name):
            return ""
        if any(name in _names(step, self._request) for step in self._outputs):
            return f"output_type is {self._request.loop.output_type!r}"
        everything = (*self._program.units, *self._program.outputs)
        readers = [step for step in everything if name in _names(step, self._request)]
        missing = [step.only_with for step in readers if not is_enabled(step, self._request.values)]
        return f"{missing[0]} is not given" if missing else ""

    def unused(self, name: str) -> str:
        """Return the reason why the results of all units that read a name are not read in the call, as text; "" if one
        is, or is read by the loop or the network.
        """
        written = [one for step in self.of(name) for one in step.writes]
        in_loop = LOOP_VALUES | self._conditions.keys()
        reasons = ["" if one in in_loop else self.unread(one) for one in written]
        return reasons[0] if all(reasons) else ""

    def ignored(self, name: str, seen: tuple[str, ...] = ()) -> str | None:
        """Return the reason why the value of a name changes nothing: each unit that reads it ignores it, or writes only
        names that are ignored; None if it has an effect.
        """
        readers = self.of(name)
        if not readers or name in self._conditions or name in seen:
            return None
        reasons = [self._reason(step, name, (*seen, name)) for step in readers]
        return None if None in reasons else reasons[0]

    def _reason(self, step: Unit, name: str, seen: tuple[str, ...]) -> str | None:
        if name in (ignored := self._ignored.get(step.name, {})):
            return ignored[name]
        reasons = [self.ignored(written, seen) for written in step.writes]
        return None if None in reasons or not reasons else reasons[0]


def _names(step: Unit, request: Request) -> set[str]:
    """Return the set of the names that a unit reads in the branches of a call."""
    renamed = {name for branch in request.branches for name in step.branches.get(branch, {}).values()}
    return {read.name for read in step.reads} | renamed
