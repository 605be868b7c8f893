"""The denoising loop of a call.

A solver (`diffsynth.sampling.solver`) runs the steps. For each it calls `velocity` once or more, and `end_step`:

    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity(latents, sigma)    begin_step: cancellation, and the components of the step are loaded
                                    predict: each branch of guidance, with step cache, attention backend and windows
                                    guide: the branches are combined
        latents = ...
        end_step(index, latents)    the latents are finite, observers and the caller's `on_step`

Everything follows the index of the step, not the number of evaluations: experts, the step cache, the attention backend,
progress and cancellation are the same for all evaluations of one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.finite import LateCheck, nonfinite
from diffsynth.core.progress import current, task
from diffsynth.errors import MissingComponent, NotFinite, shortened
from diffsynth.runtime.acceleration.session import StepCacheSession, step_cache_session
from diffsynth.runtime.acceleration.step_attention import attention_at, check_attention
from diffsynth.runtime.branch_lora import ARGUMENTS, BranchLoRASession
from diffsynth.runtime.feature import StepContext
from diffsynth.runtime.guidance import GuidanceStep
from diffsynth.runtime.guidance_branches import MERGES, Branches
from diffsynth.runtime.interface import LoopPipeline
from diffsynth.runtime.progress import no_progress
from diffsynth.runtime.request import Evaluation, Request, Step
from diffsynth.runtime.role import member_roles
from diffsynth.runtime.solvers import find_solver, load_solver
from diffsynth.runtime.unit import CallValues, runs
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.solver import with_progress
from diffsynth.sampling.windows import SlidingWindow, Window, blend_windows

WINDOWS = "sliding_window"
"""The name that a unit writes to have the frames computed in overlapping windows: a `SlidingWindow`, or None."""


class DenoisingLoop:
    """The denoising loop of one call, from the latents at the first noise level to those at the last.

    Args:
        pipe: the pipeline, whose `velocity()` is called.
        request: the checked call.
        values: of the call, after its units ran: `latents`, `sigmas` and the conditions.
    """

    def __init__(self, pipe: LoopPipeline, request: Request, values: CallValues) -> None:
        self._pipe, self._request, self._values = pipe, request, values
        self._sigmas: Tensor = values.shared["sigmas"]
        self._levels: list[float] = self._sigmas.tolist()
        cond = values.for_branch("cond")
        self._steps = [
            StepContext(sigma, index, self.num_steps, networks=pipe.components)
            for index, sigma in enumerate(self._levels[:-1])
        ]
        self._roles = [pipe.roles_at(step, cond) for step in self._steps]
        conditions = {
            branch: {name: value for name, value in values.for_branch(branch).items() if name in pipe.condition_rules}
            for branch in values.branches
        }
        self._constraints = [
            (rule.constrain, cond[name])
            for name, rule in pipe.condition_rules.items()
            if rule.constrain is not None and cond.get(name) is not None
            if name not in pipe.velocity_arguments({name: cond[name]}, self._steps[0])
        ]
        merges = bool(cond.get(MERGES, False))
        self._branches = Branches(conditions, merges=merges, batch_size=request.batch_size, axis=pipe.mesh.branches)
        self._windows: SlidingWindow | None = cond.get(WINDOWS)
        self._loras = _branch_loras(pipe, request, cond)
        if merges and self._loras.is_used:
            raise ValueError(
                f"{' and '.join(ARGUMENTS)} need the branches of guidance one by one, and this call computes them as "
                "one batch"
            )
        self._call_states: dict[str, dict[str, Any]] = {}
        self._guidance = request.guidance
        self._guidance_state: dict[str, Any] = {}
        self._step = self._steps[0]
        self._evaluation = 0
        self._first: Evaluation | None = None
        self._finite = LateCheck(pipe.device)

    @property
    def num_steps(self) -> int:
        """The number of steps of the schedule."""
        return len(self._levels) - 1

    def runs_of_equal_roles(self) -> list[tuple[tuple[str, ...], range]]:
        """Return a list of (roles, indices of steps): one for each run of steps that use equal roles, in order."""
        runs = []
        for roles, steps in groupby(range(self.num_steps), lambda index: self._roles[index]):
            indices = list(steps)
            runs.append((roles, range(indices[0], indices[-1] + 1)))
        return runs

    def run(self, steps: range | None = None) -> None:
        """Run the steps, and write the latents at the last noise level, an fp32 tensor, to the call's values.

        Args:
            steps: indices of the steps to run, without gaps; None is all of them. The latents of the call's values are
                those at the beginning of the first.
        """
        request, pipe = self._request, self._pipe
        steps = range(self.num_steps) if steps is None else steps
        # Latents stay fp32: in bf16, steps near the end of the schedule would round most of their change away.
        latents = self._values.shared["latents"].float()
        self._step = self._steps[steps.start]
        self._step_cache = _step_cache_session(pipe, request)
        self._experts = pipe.switch_experts(self._roles[steps.start : steps.stop], request.plan)
        self._notify("denoise_started", pipeline=pipe, num_steps=self.num_steps, shape=tuple(latents.shape))
        solver = load_solver(find_solver(request.loop.solver))
        progress = request.loop.progress_bar_cmd if pipe.mesh.is_main_process else no_progress
        with self._experts, self._step_cache, self._loras, task("denoise", total=len(steps), unit="steps"):
            self._values.shared["latents"] = solver(
                self.velocity,
                latents,
                self._sigmas[steps.start : steps.stop + 1],
                noise=lambda index: self._noise(steps.start + index, latents.shape[1:]),
                on_step=lambda index, latents: self.end_step(steps.start + index, latents),
                progress=lambda indices: with_progress(indices, progress, name="progress_bar_cmd"),
            )
        self.raise_if_not_finite(self._finite.finish())

    def velocity(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided velocity at a noise level, an fp32 tensor of the shape of `latents`: one evaluation of a
        step, for the solver.

        Args:
            latents: of the current step.
            sigma: a scalar, the noise level of the evaluation.
        """
        if self._evaluation == 0:
            self.begin_step()
        levels = sigma.to(self._pipe.device, torch.float32).expand(len(latents))
        # An adapted prediction divides by small numbers near one end of the schedule; see `sampling.prediction`.
        given = latents.to(self._pipe.dtype) if self._pipe.prediction == "velocity" else latents
        predictions = self._branches.predict(self.predict, given, levels)
        guided = self.guide(predictions, latents, levels)
        for constrain, value in self._constraints:
            guided = constrain(guided, latents, levels, value)
        if self._evaluation == 0 and self._request.loop.on_step is not None:
            self._first = Evaluation(latents, guided, sigma)
        self._evaluation += 1
        return guided

    def begin_step(self) -> None:
        """Raise `Cancelled` if the caller cancelled, and load the components that the step uses.

        A step with other networks than the one before, such as that in which a ControlNet ends, reuses nothing.
        """
        self._request.raise_if_cancelled()
        index = self._step.index
        if index and self._roles[index] != self._roles[index - 1]:
            self._step_cache.forget()
        self._experts.begin_step()

    def predict(self, branch: str, latents: Tensor, levels: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return the velocity of one branch of guidance, an fp32 tensor, with the step cache and the attention backend
        of the step.

        Args:
            branch: its name, or the names of branches that are computed as one batch, joined by "+".
            latents: in the pipeline's dtype.
            levels: noise levels `b`, fp32.
            conditions: of the branch.
        """
        step = self._step.in_branch(branch, self._call_states.setdefault(branch, {}))
        # Each evaluation of a step has a history of its own, so that a step cache compares like with like.
        history = branch if self._evaluation == 0 else f"{branch}, evaluation {self._evaluation + 1}"
        is_last = step.index == self.num_steps - 1
        with (
            self._step_cache.forward_pass(history, is_last=is_last),
            attention_at(self._request.loop.attention, step.index, self.num_steps),
            self._loras.in_branch(branch),
        ):
            return velocity_in_windows(self._pipe, latents, levels, conditions, step, self._windows).float()

    def guide(self, predictions: Mapping[str, Tensor], latents: Tensor, levels: Tensor) -> Tensor:
        """Return the velocity that guidance makes of those of the branches, a tensor; the only one without guidance."""
        if len(predictions) == 1:
            return next(iter(predictions.values()))
        step = GuidanceStep(
            latents=latents,
            sigma=levels,
            index=self._step.index,
            num_steps=self.num_steps,
            is_first_evaluation=self._evaluation == 0,
            state=self._guidance_state,
        )
        return self._guidance.combine(predictions, float(self._request.loop.cfg_scale), step)

    def end_step(self, index: int, latents: Tensor) -> None:
        """Check that the latents are finite, notify observers, call the caller's `on_step` with the latents after step
        `index`, and go on to the next step.

        Raises:
            NotFinite: the latents hold NaN or infinity; on a device those of the step before.
        """
        self.raise_if_not_finite(self._finite.add(index, latents))
        sigma, sigma_next, reused = self._levels[index], self._levels[index + 1], self._step_cache.take_reused()
        self._notify("step_done", pipeline=self._pipe, step=index, num_steps=self.num_steps, sigma=sigma_next)
        if self._request.loop.on_step is not None:
            first, self._first = self._first, None
            try:
                self._request.loop.on_step(Step(index, self.num_steps, sigma, sigma_next, latents, reused, first))
            finally:
                if first is not None:
                    first.drop()
        current("denoise").advance()
        self._evaluation = 0
        if index + 1 < self.num_steps:
            self._step = self._steps[index + 1]

    def raise_if_not_finite(self, index: int | None) -> None:
        """Raise NotFinite that names step `index`, and weights that hold NaN or infinity; do nothing for None.

        Raises:
            NotFinite: `index` is not None.
        """
        if index is None:
            return
        pipe = self._pipe
        causes = []
        for role in pipe.all_loop_roles:
            part = pipe.parts.get(role)
            weights = dict(part.named_parameters()) if isinstance(part, nn.Module) else {}
            if wrong := nonfinite(weights, whole=True):
                causes.append(f"{role} has NaN or infinity in {shortened(wrong, 3)}; load other weights or LoRAs. ")
        half = "torch.float16 overflows: use torch.bfloat16. " if pipe.dtype == torch.float16 else ""
        raise NotFinite(
            f"after step {index + 1} of {self.num_steps} the latents hold NaN or infinity, so nothing can be decoded "
            f"from them. {''.join(causes) or half}If the weights and LoRAs are right, lower cfg_scale and other "
            f"strengths, or use a larger dtype."
        )

    def _noise(self, index: int, shape: Sequence[int]) -> Tensor:
        """Return the noise that a solver adds in a step, a tensor; entry i depends on its seed and the index only."""
        seeds = [None if seed is None else _step_seed(seed, index) for seed in self._values.shared["seeds"]]
        return initial_noise(shape, seeds, dtype=torch.float32, device=self._pipe.device)

    def _notify(self, hook: str, **facts: Any) -> None:
        # Steps on meta belong to a plan, which observers must not take for a call.
        if self._pipe.device.type != "meta" and not self._request.is_warmup:
            _discovery.notify(hook, **facts)


def velocity_in_windows(
    pipe: LoopPipeline,
    latents: Tensor,
    sigma: Tensor,
    conditions: Mapping[str, Any],
    step: StepContext,
    sliding_window: SlidingWindow | None,
) -> Tensor:
    """Return the velocity of latents, a tensor of their shape and dtype: of all frames at once, or blended from
    overlapping windows of frames.

    Args:
        pipe: the pipeline.
        latents: `b c h w` or `b c t h w`; windows need `b c t h w`.
        sigma: noise levels `b`, fp32.
        conditions: name -> value; each is cut as its `Condition` declares.
        step: the step.
        sliding_window: size and stride of the windows; None computes all frames at once.
    """
    windows = [] if sliding_window is None else sliding_window.windows(latents.shape[2] - sliding_window.prefix_frames)
    if len(windows) < 2:
        return pipe.velocity(latents, sigma, **pipe.velocity_arguments(conditions, step))

    def velocity(part: Tensor, window: Window) -> Tensor:
        cut = {name: _cut(pipe, name, value, window) for name, value in conditions.items()}
        return pipe.velocity(part, sigma, **pipe.velocity_arguments(cut, replace(step, window=window)))

    return blend_windows(velocity, windows, latents)


def _cut(pipe: LoopPipeline, name: str, value: Any, window: Window) -> Any:
    if value is None:
        return None
    cut = pipe.condition_rules[name].cut
    if isinstance(cut, str):
        raise ValueError(f"sliding windows cannot be used with {name}: {cut}")
    return cut(value, window)


def check_loop(pipe: LoopPipeline, request: Request) -> None:
    """Raise an error unless the loop's arguments of a call suit the pipeline's networks and units.

    Args:
        pipe: the pipeline.
        request: the call.

    Raises:
        MissingComponent: a network of the loop is not loaded.
        Refused: a step cache or an attention backend cannot serve the networks or the device.
        ValueError: an unknown solver; a guidance that refuses the number of steps, whose branches no unit declares, or
            whose branches are not as many as the processes that share them.
    """
    for role in pipe.loop_roles:
        if pipe.components.get(role) is None and not pipe.roles[role].optional:
            raise MissingComponent(
                f"the denoising loop needs {role}, which is not loaded; add its file to model_configs"
            )
    loop = request.loop
    load_solver(find_solver(loop.solver))
    _step_cache_session(pipe, request)
    check_attention(loop.attention, pipe.device, pipe.dtype)
    is_guided = len(request.branches) > 1
    if is_guided and (reason := request.guidance.refuses(loop.num_inference_steps)) is not None:
        raise ValueError(f"guidance={request.guidance!r} is refused: {reason}")
    for branch in request.branches[1:]:
        if branch not in pipe.program.branches:
            raise ValueError(
                f"cfg_scale={loop.cfg_scale} with {request.guidance!r} needs the branch {branch!r}, for which no "
                f"unit of {type(pipe).__name__} reads other values; it has: "
                f"{', '.join(sorted(pipe.program.branches)) or 'none'}. Turn guidance off with cfg_scale=1"
            )
    _branch_loras(pipe, request, {name: getattr(loop, name) for name in ARGUMENTS})
    pipe.mesh.check_call(branches=request.branches, step_cache=loop.step_cache, cancel=loop.cancel)


def _step_cache_session(pipe: LoopPipeline, request: Request) -> StepCacheSession:
    """Return the step caches of a call, of the networks of the pipeline itself. Those of features always run: what the
    blocks of a ControlNet return is no stream that could be predicted from one block to the next.
    """
    roles = member_roles(pipe.loop_roles, pipe.components)
    return step_cache_session(request.loop.step_cache, pipe.parts, roles, pipe.model_name)


def _branch_loras(pipe: LoopPipeline, request: Request, values: Mapping[str, Any]) -> BranchLoRASession:
    """Return the LoRAs of the branches of a call.

    Args:
        pipe: the pipeline.
        request: the call.
        values: argument in `ARGUMENTS` -> its LoRAs or None.
    """
    named = zip(request.guidance.branches, ARGUMENTS, strict=False)
    loras = {branch: values[name] for branch, name in named if values.get(name) is not None}
    return pipe.branch_loras(loras, request.branches)


def refuse_windows(pipe: LoopPipeline, values: Mapping[str, Any]) -> None:
    """Raise ValueError if a call uses a unit that writes a condition which cannot be cut for sliding windows.

    Args:
        pipe: the pipeline.
        values: the arguments of the call.

    Raises:
        ValueError: with the reason that the condition declares.
    """
    for step in pipe.program.units:
        is_used = runs(step, pipe.components, values) and pipe.program.is_used(step, values)
        for name in step.writes if is_used else ():
            cut = pipe.condition_rules[name].cut if name in pipe.condition_rules else None
            if isinstance(cut, str):
                raise ValueError(
                    f"{step.title} writes {name!r}, which sliding windows cannot cut: {cut}. Leave out the sliding "
                    "window, or the arguments of the unit"
                )


def _step_seed(seed: int, index: int) -> int:
    """Return the seed of the noise of a step: another one for each step, and none of the seeds of nearby images."""
    return (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**63
