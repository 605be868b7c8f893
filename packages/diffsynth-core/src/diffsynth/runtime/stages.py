"""The stages of a call: its units, the steps of its loop and its output units, in running order.

`Pipeline.stages(request)` lists them. The call runs them one after the other, and so does a memory plan, on meta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from diffsynth.core.planning.workload import StageKind
from diffsynth.core.progress import NO_TASK, reporting, task
from diffsynth.errors import MissingComponent
from diffsynth.runtime.interface import LoopPipeline
from diffsynth.runtime.loop import DenoisingLoop
from diffsynth.runtime.request import Request
from diffsynth.runtime.unit import CallValues, Unit, is_enabled, needed_roles, run_unit, runs


@dataclass(frozen=True)
class Stage:
    """One stage of a call: code, and the components that it uses.

    Args:
        kind: whether it is a unit before the loop, the loop, or a unit after it.
        name: of the unit, or "denoise".
        roles: that it uses; for the loop, all that its steps use.
        run: called with the values of the call, which it changes.
    """

    kind: StageKind
    name: str
    roles: tuple[str, ...]
    run: Callable[[CallValues], None]

    def parts(self, values: CallValues, *, at_most: int) -> list[StagePart]:
        """Return a list of the parts of the stage: one, of one step.

        Args:
            values: of the call, after all earlier stages ran.
            at_most: number of steps that each part runs.
        """
        return [StagePart(self.name, self.roles, 1, 1, lambda: self.run(values))]


@dataclass(frozen=True)
class StagePart:
    """Steps of a stage that use equal roles, of which the first few are run.

    Args:
        name: of the stage; of the loop's parts also the roles, if there are several.
        roles: that its steps use.
        steps: number of its steps.
        traced: number of steps that `run` runs.
        run: runs these steps.
    """

    name: str
    roles: tuple[str, ...]
    steps: int
    traced: int
    run: Callable[[], None]


@dataclass(frozen=True)
class LoopStage(Stage):
    """The stage of the denoising loop, whose steps may use different roles.

    Args:
        loop: from the values of the call to its loop.
    """

    loop: Callable[[CallValues], DenoisingLoop]

    def parts(self, values: CallValues, *, at_most: int) -> list[StagePart]:
        """Return a list of the parts of the loop: one for each run of steps that use equal roles, in order; see
        `Stage.parts`.
        """
        loop = self.loop(values)
        runs = loop.runs_of_equal_roles()
        return [
            StagePart(
                self.name if len(runs) == 1 else f"{self.name} ({', '.join(roles)})",
                roles,
                len(steps),
                min(len(steps), at_most),
                lambda steps=steps: loop.run(steps[:at_most]),  # type: ignore[misc]
            )
            for roles, steps in runs
        ]


_NAMES = {StageKind.PREPARE: "encode", StageKind.OUTPUT: "decode"}
"""Kind of stages -> the stage of their progress. The loop reports its steps itself."""


def run_stages(
    stages: Sequence[Stage],
    values: CallValues,
    request: Request,
    *,
    loaded: Callable[[Stage], AbstractContextManager[None]],
) -> None:
    """Run the stages of a call, and report the progress to the caller's `on_progress`.

    Args:
        stages: in running order.
        values: of the call; changed in place.
        request: the call.
        loaded: returns a context manager in which the components of a stage are on the device.

    Raises:
        Cancelled: the caller set `cancel`.
    """
    loop = request.loop
    with reporting(loop.on_progress, cancel=loop.cancel):
        for kind, group in groupby(stages, key=lambda stage: stage.kind):
            run = list(group)
            name = _NAMES.get(kind, "")
            with task(name, total=len(run), unit="units") if name else nullcontext(NO_TASK) as units:
                for stage in run:
                    request.raise_if_cancelled()
                    units.describe(stage.name)
                    with loaded(stage):
                        stage.run(values)
                    units.advance()


def stages_of(pipe: LoopPipeline, request: Request) -> list[Stage]:
    """Return a list of the `Stage`s of a call, in running order. Units whose optional roles are empty are left out.

    Args:
        pipe: the pipeline.
        request: the checked call.

    Raises:
        MissingComponent: a role of an output unit is not loaded and not optional, and the call asks for its output.
    """
    program, components, arguments = pipe.program, pipe.components, request.values
    units = [step for step in program.units if runs(step, components, arguments)]
    stages = [Stage(StageKind.PREPARE, step.name, step.roles, _runner(step, components)) for step in units]
    if pipe.has_loop():
        stages.append(_loop_stage(pipe, request))
    if request.loop.output_type == "latents":
        return stages
    outputs = [step for step in program.outputs if is_enabled(step, arguments) and not _is_left_out(step, pipe)]
    read = {read.name for step in outputs for read in step.reads}
    for index, step in enumerate(outputs):
        if missing := [role for role in needed_roles(step) if components.get(role) is None]:
            raise MissingComponent(
                f"{step.title} needs {' and '.join(missing)}, which is not loaded; ask for output_type='latents'"
            )
        run = _runner(step, components)
        if index == 0:
            run = _freeing(run, read, pipe)
        stages.append(Stage(StageKind.OUTPUT, step.name, step.roles, run))
    return stages


def _loop_stage(pipe: LoopPipeline, request: Request) -> LoopStage:
    def loop(values: CallValues) -> DenoisingLoop:
        return DenoisingLoop(pipe, request, values)

    return LoopStage(StageKind.DENOISE, "denoise", pipe.all_loop_roles, lambda values: loop(values).run(), loop)


def _runner(step: Unit, components: Mapping[str, Any]) -> Callable[[CallValues], None]:
    return lambda values: run_unit(step, components, values)


def _is_left_out(step: Unit, pipe: LoopPipeline) -> bool:
    """Whether an output unit needs an optional role that is empty, such as that of an upscaler, so that calls work
    without it.
    """
    return any(pipe.components.get(role) is None and pipe.roles[role].optional for role in needed_roles(step))


def _freeing(run: Callable[[CallValues], None], names: set[str], pipe: LoopPipeline) -> Callable[[CallValues], None]:
    """Return a function that runs the first unit after the loop, after values that no such unit reads are deleted.

    The prompt's hidden states and control videos would take memory beside the decoder's activations.
    """

    def free_and_run(values: CallValues) -> None:
        values.retain(names)
        if "latents" in values.shared:
            values.shared["latents"] = values.shared["latents"].to(pipe.dtype)
        run(values)

    return free_and_run
