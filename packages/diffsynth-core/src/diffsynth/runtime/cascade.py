"""Cascades: pipelines in order, each of which takes what earlier ones return.

A base model and a refiner, a prior and its decoder, a generator and an upscaler are cascades:

    cascade = Cascade(
        CascadeStage("base", base_pipe),
        CascadeStage("refine", refine_pipe, inputs={"input_image": "base"}, arguments={"denoising_strength": 0.3}),
    )
    image = cascade("a red apple", seed=0, refine={"num_inference_steps": 4})

A conversion between two stages, such as a resize of latents, is a stage of its own: a pipeline without a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

from diffsynth.core.planning import MemoryPlan
from diffsynth.core.vram.managed import managed
from diffsynth.errors import did_you_mean, shown
from diffsynth.runtime.background import BackgroundMethods
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.planning import plan_with_output
from diffsynth.runtime.progress import progress_bar
from diffsynth.runtime.recorded import RecordedOutput, draw_seed
from diffsynth.runtime.request import Request, Step, reject_unknown
from diffsynth.runtime.stages import Stage
from diffsynth.runtime.unit import Phase, needed_for

_OPTIONS = ("on_stage", "return_record", "vram_limit", "ram_limit", "policy", "device")
"""The arguments of a cascade's own methods."""

_SIZES = ("height", "width", "num_frames")
"""The values that determine the shape of an image or a video."""


@dataclass(frozen=True)
class CascadeStage:
    """A pipeline of a cascade.

    Args:
        name: an identifier, unique in the cascade, that is no argument of one of its pipelines.
        pipeline: of the stage. Stages may share components, or be the same pipeline.
        inputs: argument of the pipeline -> name of the earlier stage whose output it takes.
        arguments: argument -> default in the cascade. `output_type` is the form in which later stages take the output:
            "pil" images, whose pixels are rounded to 8 bits, a "tensor", or "latents".

    Raises:
        TypeError: `pipeline` is no `Pipeline`, or does not have one of the arguments; the message has the nearest
            spelling. Or `inputs` or `arguments` are no dict.
        ValueError: the name is no identifier, or an argument has both an input and a default.
    """

    name: str
    pipeline: Pipeline
    inputs: Mapping[str, str] = field(default_factory=dict, hash=False)
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.pipeline, Pipeline):
            raise TypeError(f"stage {self.name!r}: pipeline={self.pipeline!r}: expected a Pipeline")
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"stage {self.name!r}: expected a name that can be a keyword of a call, such as 'refine'")
        for each in ("inputs", "arguments"):
            if not isinstance(given := getattr(self, each), Mapping):
                raise TypeError(f"stage {self.name!r}: {each}={shown(given)}: expected a dict argument -> value")
            object.__setattr__(self, each, MappingProxyType(dict(getattr(self, each))))
        with _noting(self):
            reject_unknown((*self.inputs, *self.arguments), self.pipeline.__signature__, self.pipeline.other_arguments)
        if "return_record" in (*self.inputs, *self.arguments):
            raise TypeError(f"stage {self.name!r}: return_record is an argument of the cascade's call; leave it out")
        if both := sorted(set(self.inputs) & set(self.arguments)):
            raise ValueError(f"stage {self.name!r}: {both[0]!r} has an input and a default; leave out one of them")

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can neither be copied nor pickled.
        return CascadeStage, (self.name, self.pipeline, dict(self.inputs), dict(self.arguments))


@dataclass(frozen=True, kw_only=True)
class CascadeStep(Step):
    """A step of the denoising loop of a stage, as `on_step` receives it; other fields are those of `Step`.

    Args:
        stage: name of the stage.
        stage_index: of the stage, 0 for the first.
        num_stages: number of stages of the cascade.
    """

    stage: str
    stage_index: int
    num_stages: int

    @property
    def progress(self) -> float:
        """The share of the cascade that is done after the step, in (0, 1]; every stage counts alike."""
        return (self.stage_index + (self.index + 1) / self.num_steps) / self.num_stages


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The output of a stage and its seeds, as `on_stage` receives them.

    Args:
        stage: name of the stage.
        stage_index: of the stage, 0 for the first.
        num_stages: number of stages of the cascade.
        output: what the call of its pipeline returned; not a copy.
        seeds: of the call, one for each result.
    """

    stage: str
    stage_index: int
    num_stages: int
    output: Any = field(repr=False)
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class CascadePlan:
    """The memory plans of a cascade. Sizes in bytes.

    Args:
        plans: name of a stage -> its plan.
        beside: name of a stage -> bytes on the device, while it runs, of weights of other stages and of outputs that
            it or a later stage takes.
    """

    plans: Mapping[str, MemoryPlan]
    beside: Mapping[str, int]

    @property
    def peak_vram(self) -> int:
        """Peak device memory over all stages, in bytes; 0 if the device is the CPU."""
        return max(plan.peak_vram + self.beside[name] for name, plan in self.plans.items())

    @property
    def peak_ram(self) -> int:
        """Peak host memory over all stages, in bytes."""
        return max(plan.peak_ram for plan in self.plans.values())

    def to_dict(self) -> dict[str, Any]:
        """Return a dict with `peak_vram`, `peak_ram`, and under `stages` the dict of each plan and its `beside`."""
        stages = {name: plan.to_dict() | {"beside": self.beside[name]} for name, plan in self.plans.items()}
        return {"peak_vram": self.peak_vram, "peak_ram": self.peak_ram, "stages": stages}


class Cascade(BackgroundMethods):
    """Pipelines that run one after the other, each fed by what earlier ones return.

    Calls share no state, so that several threads may call one cascade; see `Pipeline`.

    Args:
        stages: in running order.

    Raises:
        ValueError: no stage, a name that two stages have or that is an argument of a pipeline, an input from a stage
            that is not earlier, or an output that no later stage takes.
    """

    def __init__(self, *stages: CascadeStage) -> None:
        self._stages = stages
        _check_stages(stages)

    @property
    def arguments(self) -> dict[str, tuple[str, ...]]:
        """A dict argument -> names of the stages that it is passed to, if a call states it once for all stages."""
        names = dict.fromkeys(name for stage in self._stages for name in stage.pipeline.__signature__.parameters)
        return {name: takers for name in names if (takers := self._takers(name))}

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        on_stage: Callable[[StageResult], None] | None = None,
        return_record: bool = False,
        **arguments: Any,
    ) -> Any:
        """Run the stages; return what the last one returns.

        The arguments of all stages are checked before the first one runs; see `check`. `Cancelled`, or an error in a
        stage, ends the call: what earlier stages returned has been passed to `on_stage`, and nothing else keeps it.

        Args:
            prompt: of all stages that have a prompt.
            on_stage: called with a `StageResult` after each stage.
            return_record: whether a `RecordedOutput` of the last stage is returned, whose records have those of all
                stages under `stages`, each with its `inputs` (argument -> name of the stage that it is taken from).
            arguments: an argument of a pipeline is passed to all stages that have it, except those in which it is an
                input; `output_type` is that of the last stage. The name of a stage takes a mapping of the arguments of
                this stage alone: `refine={"denoising_strength": 0.3}`. `on_step` receives a `CascadeStep`. Without a
                `seed` a random one is used in all stages.

        Returns:
            one result for one prompt, a list (or a tensor `b ...`) for several prompts, images or seeds; with
            `return_record` a `RecordedOutput` of it.

        Raises:
            TypeError: an argument that no stage has, with the nearest spelling, or one that an earlier stage provides.
            ValueError: a value out of range, or lists whose lengths do not fit.
            MissingComponent: an argument of a unit whose role is not loaded.
            Cancelled: the caller set `cancel`.
        """
        calls = self._with_seeds(self._calls(prompt, arguments))
        requests = self._requests(calls)
        outputs: dict[str, Any] = {}
        records: list[list[Mapping[str, Any]]] = []
        for index, stage in enumerate(self._stages):
            position: dict[str, Any] = {"stage": stage.name, "stage_index": index, "num_stages": len(self._stages)}
            call = _reported(stage, calls[stage.name], position)
            inputs = {argument: outputs[source] for argument, source in stage.inputs.items()}
            with _noting(stage):
                output = stage.pipeline(**call, **inputs, return_record=return_record)
            made = output
            if return_record:
                records.append([made.record, *(one.record for one in made.results)])
                output = made.output
            if on_stage is not None:
                seeds = tuple(seed for seed in requests[stage.name].seeds if seed is not None)
                on_stage(StageResult(output=output, seeds=seeds, **position))
            outputs = self._held({**outputs, stage.name: output}, index + 1)
        return self._recorded(made, records) if return_record else output

    def check(self, prompt: str | Sequence[str] = "", **arguments: Any) -> dict[str, Request]:
        """Check the arguments of a call without making it; return a dict name of a stage -> its `Request`.

        Inputs that are images or videos (`Pipeline.output_kind`) are blank ones of the size that the earlier stage
        returns. A stage with another input, such as latents, is checked without it: names, ranges and roles, while the
        pipeline's `check()` runs when the stage begins. Errors are those of the call.

        Args:
            prompt, arguments: of the call.
        """
        return self._requests(self._calls(prompt, arguments))

    def stages(self, requests: Mapping[str, Request]) -> dict[str, list[Stage]]:
        """Return a dict name of a stage of the cascade -> the stages of its pipeline's call, in running order.

        Args:
            requests: the checked call, see `check`.

        Raises:
            MissingComponent: a role of an output unit is not loaded, and the call asks for its output.
        """
        return {stage.name: stage.pipeline.stages(requests[stage.name]) for stage in self._stages}

    def plan(
        self,
        prompt: str | Sequence[str] = "",
        *,
        vram_limit: float | None = None,
        ram_limit: float | None = None,
        policy: str | None = None,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> CascadePlan:
        """Return the `CascadePlan` of a call, without making it.

        Weights of other stages that no policy offloads stay on the device; for a limit or a policy they are taken to
        be offloaded.

        Args:
            prompt, arguments: of the call. Without a prompt one of 512 tokens is assumed.
            vram_limit, ram_limit, policy, device: see `Pipeline.plan`; a limit holds for each stage.

        Raises:
            TypeError, ValueError: an argument that the call would refuse, too.
            NotEnoughMemory: a stage cannot keep a limit; a note names the stage.
            Unplannable: the code of a stage asks for values that only a real run has.
        """
        calls = self._calls(prompt, arguments)
        requests = self._requests(calls)
        limits: dict[str, Any] = {"vram_limit": vram_limit, "ram_limit": ram_limit, "policy": policy}
        plans: dict[str, MemoryPlan] = {}
        beside: dict[str, int] = {}
        outputs: dict[str, Any] = {}
        for index, stage in enumerate(self._stages):
            outputs = self._held(outputs, index)
            held = sum(each.nbytes for each in outputs.values() if isinstance(each, Tensor))
            on = torch.device(stage.pipeline.device if device is None else device)
            call = {**calls[stage.name], **_known_inputs(stage, outputs)}
            with _noting(stage):
                plan, output = plan_with_output(stage.pipeline, call, device=on, **limits)
            plans[stage.name] = plan
            outputs[stage.name] = _as_output(output, requests[stage.name])
            if on.type == "cpu":
                beside[stage.name] = 0
                continue
            offloads = vram_limit is not None or policy not in (None, "none")
            weights = 0 if offloads else self._other_weights(stage, every=policy == "none")
            beside[stage.name] = weights + held
        return CascadePlan(plans, beside)

    def _recorded(self, made: RecordedOutput, records: Sequence[Sequence[Mapping[str, Any]]]) -> RecordedOutput:
        """Return the `RecordedOutput` of a call, from that of the last stage and, for each stage, the records of its
        call and of its results.
        """

        def at(index: int) -> dict[str, Any]:
            each = zip(self._stages, records, strict=True)
            stages = {stage.name: {**own[index], "inputs": dict(stage.inputs)} for stage, own in each}
            return {"pipeline": f"{type(self).__module__}:{type(self).__qualname__}", "stages": stages}

        # A stage may return another number of results, such as the frames of a video; each then has the record of all.
        fits = all(len(own) == len(records[-1]) for own in records)
        results = [replace(one, record=at(index if fits else 0)) for index, one in enumerate(made.results, 1)]
        return replace(made, record=at(0), results=tuple(results))

    def _calls(self, prompt: str | Sequence[str], arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return a dict name of a stage -> the arguments of its call, without inputs."""
        if prompt != "":
            arguments = {"prompt": prompt, **arguments}
        calls = {stage.name: dict(stage.arguments) for stage in self._stages}
        for name, value in arguments.items():
            if name in calls:
                continue
            for taker in self._takers(name) or self._refuse(name):
                calls[taker][name] = value
        for stage in self._stages:
            own = arguments.get(stage.name, {})
            if not isinstance(own, Mapping):
                raise TypeError(f"{stage.name}={own!r}: expected a mapping of arguments of stage {stage.name!r}")
            for name in own:
                if name in stage.inputs:
                    raise _is_input(stage, name)
                if name in _OPTIONS:
                    raise TypeError(f"{name!r} of stage {stage.name!r}: expected as an argument of the cascade's call")
            calls[stage.name].update(own)
        return calls

    def _takers(self, argument: str) -> tuple[str, ...]:
        """Return a tuple of the names of the stages that an argument of the call is passed to."""
        last = self._stages[-1:] if argument == "output_type" else self._stages
        return tuple(
            stage.name
            for stage in last
            if argument in stage.pipeline.__signature__.parameters and argument not in (*stage.inputs, *_OPTIONS)
        )

    def _refuse(self, argument: str) -> NoReturn:
        for stage in self._stages:
            if argument in stage.inputs:
                raise _is_input(stage, argument)
        known = [*self.arguments, *(stage.name for stage in self._stages)]
        raise TypeError(
            f"unknown argument {argument!r}{did_you_mean(argument, known)} This cascade takes: {', '.join(known)}"
        )

    def _held(self, outputs: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return a dict name of a stage -> output: those that the stage of this index or a later one takes."""
        taken = {source for stage in self._stages[index:] for source in stage.inputs.values()}
        return {name: value for name, value in outputs.items() if name in taken}

    def _with_seeds(self, calls: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return `calls` with one random seed in those that have none, so that `on_stage` can record it."""
        (seed,) = self._stages[0].pipeline.mesh.broadcast_seeds([draw_seed()])
        return {
            name: {**call, "seed": seed} if call.get("seed") is None else dict(call) for name, call in calls.items()
        }

    def _requests(self, calls: Mapping[str, Mapping[str, Any]]) -> dict[str, Request]:
        """Return a dict name of a stage -> its checked `Request`, with blank inputs."""
        requests: dict[str, Request] = {}
        outputs: dict[str, Any] = {}
        for stage in self._stages:
            with _noting(stage):
                request = _check(stage, calls[stage.name], outputs)
            requests[stage.name] = request
            outputs[stage.name] = _as_output(_blank_pixels(stage.pipeline, request), request)
        return requests

    def _other_weights(self, stage: CascadeStage, *, every: bool) -> int:
        """Return the bytes of the weights of other stages that stay on the device: all, or those without a policy."""
        own = {id(part) for part in stage.pipeline.parts.values()}
        others = {id(part): part for other in self._stages for part in other.pipeline.parts.values()}
        modules = [part for key, part in others.items() if key not in own and isinstance(part, nn.Module)]
        staying = [module for module in modules if every or managed(module) is None]
        tensors = {id(each): each for module in staying for each in (*module.parameters(), *module.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())


def _check_stages(stages: Sequence[CascadeStage]) -> None:
    """Raise ValueError for stages that do not fit together; see `Cascade`."""
    if not stages:
        raise ValueError("a cascade without stages; pass CascadeStage(name, pipeline, inputs=...)")
    arguments = {*_OPTIONS, *(name for stage in stages for name in stage.pipeline.__signature__.parameters)}
    earlier: list[str] = []
    for stage in stages:
        if stage.name in arguments or stage.name in earlier:
            owner = "two stages" if stage.name in earlier else "an argument of the call"
            raise ValueError(f"stage {stage.name!r}: the name belongs to {owner}; give the stage another one")
        for argument, source in stage.inputs.items():
            if source not in earlier:
                raise ValueError(
                    f"stage {stage.name!r} takes {argument!r} from {source!r}, which is no earlier stage"
                    f"{did_you_mean(source, earlier)} Earlier stages: {', '.join(earlier) or 'none'}"
                )
        earlier.append(stage.name)
    taken = {source for stage in stages for source in stage.inputs.values()}
    for stage in stages[:-1]:
        if stage.name not in taken:
            raise ValueError(f"no later stage takes the output of stage {stage.name!r}; add it to inputs=")


def _is_input(stage: CascadeStage, argument: str) -> TypeError:
    return TypeError(
        f"argument {argument!r} of stage {stage.name!r} is the output of stage {stage.inputs[argument]!r}; leave it out"
    )


def _reported(stage: CascadeStage, call: Mapping[str, Any], position: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stage's call with a progress bar of its name, and callbacks that get the stage."""
    reported = dict(call)
    reported.setdefault("progress_bar_cmd", partial(progress_bar, description=stage.name))
    if (on_step := call.get("on_step")) is not None:
        reported["on_step"] = lambda step: on_step(
            CascadeStep(**{each.name: getattr(step, each.name) for each in fields(Step)}, **position)
        )
    if (on_progress := call.get("on_progress")) is not None:
        reported["on_progress"] = lambda progress: on_progress(replace(progress, cascade_stage=stage.name))
    return reported


def _check(stage: CascadeStage, call: Mapping[str, Any], outputs: Mapping[str, Any]) -> Request:
    """Return the checked `Request` of a stage; without an input that is not known, what needs it is not checked."""
    pipe, inputs = stage.pipeline, _known_inputs(stage, outputs)
    if len(inputs) == len(stage.inputs):
        return pipe.check(**call, **inputs)
    return pipe.check_arguments(**call)


def _known_inputs(stage: CascadeStage, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict argument -> output of an earlier stage, without those that are None."""
    inputs = {argument: outputs[source] for argument, source in stage.inputs.items()}
    return {argument: value for argument, value in inputs.items() if value is not None}


def _blank_pixels(pipe: Pipeline, request: Request) -> Tensor | None:
    """Return a tensor `b 3 h w` or `b 3 t h w` on meta, in the shape of a call's images or videos; None for another
    kind of output, and for latents.
    """
    names = {"image": _SIZES[:2], "video": _SIZES}.get(pipe.output_kind or "", ())
    if not names or request.loop.output_type == "latents" or not set(names) <= set(request.values):
        return None
    values = request.values
    if request.loop.output_type == "tensor":  # images are scaled where they are used, tensors must have the exact size
        units = [step for step in pipe.program.units if step.phase is Phase.SHAPE and not step.roles]
        values = pipe.run_units(needed_for(units, names), values)
    height, width, *num_frames = (values[name] for name in names)
    return torch.empty(request.batch_size, 3, *num_frames, height, width, device="meta")


def _as_output(result: Any, request: Request) -> Any:
    """Return a result on meta in the form in which the call returns it: the tensor, or blank images in its place; None
    if it cannot be known.
    """
    if not isinstance(result, Tensor) or request.loop.output_type != "pil":
        return result
    if result.ndim not in (4, 5) or result.shape[1] != 3:
        return None
    height, width = result.shape[-2:]
    image: Any = Image.new("RGB", (width, height))
    entry = image if result.ndim == 4 else [image] * result.shape[2]
    return entry if request.single else [entry] * len(result)


@contextmanager
def _noting(stage: CascadeStage) -> Iterator[None]:
    """Context manager that adds the name of the stage to errors, as a note."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised in stage {stage.name!r} of a cascade")
        raise
