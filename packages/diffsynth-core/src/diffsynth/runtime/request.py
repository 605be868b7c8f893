"""The arguments of a call: checked and completed before anything expensive runs."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypedDict, get_args

import numpy as np
from torch import Tensor

from diffsynth import _discovery
from diffsynth.core.planning import MemoryPlan
from diffsynth.core.progress import Progress, raise_if_set
from diffsynth.errors import MissingComponent, PipelineError, did_you_mean, shown
from diffsynth.runtime.acceleration.step_attention import AttentionArgument, parse_step_attention
from diffsynth.runtime.acceleration.strategies import StepCacheArgument, parse_step_cache
from diffsynth.runtime.branch_lora import BranchLoRA, parse_branch_lora
from diffsynth.runtime.guidance import Guidance, GuidanceArgument, parse_guidance
from diffsynth.runtime.progress import progress_bar
from diffsynth.runtime.synonyms import which_is_meant
from diffsynth.runtime.unit import Program, can_run, equals_default, needed_roles

MAX_STEPS = 10_000
"""The most steps that a call may have: a schedule of fp32 noise levels has no use for more."""

MAX_SIDE = 32_768
"""The largest height or width of a result in pixels; what fits the memory is usually much less, see `size_limits`."""

MAX_RESULTS = 10_000
"""The most results that a call may have; see also `call_size`, which refuses sizes beyond the memory."""

OutputType = Literal["pil", "tensor", "latents"]


class Evaluation:
    """The tensors of the first evaluation of a step, from which `Step.x0` is computed. The loop drops them when
    `on_step` returns, so that a kept `Step` keeps none of them alive.

    Args:
        latents: that `velocity()` was called with, at level `sigma`.
        velocity: guided, `noise - x0`.
        sigma: a scalar, the noise level.
    """

    def __init__(self, latents: Tensor, velocity: Tensor, sigma: Tensor) -> None:
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = (latents, velocity, sigma)
        self._versions = _versions(latents, velocity)

    def x0(self) -> Tensor:
        """Return the estimate of the clean latents, `latents - sigma * velocity`, an fp32 tensor of their shape.

        Raises:
            PipelineError: the tensors were dropped, or the solver changed them in place.
        """
        if self._tensors is None:
            raise PipelineError("step.x0 can be read only while on_step runs: read it there, and keep the tensor")
        latents, velocity, sigma = self._tensors
        if _versions(latents, velocity) != self._versions:
            raise PipelineError(
                "step.x0 is not known: the solver changed the latents or the velocity of the step in place. Change "
                "the solver, or use another one"
            )
        return latents.float() - velocity.float() * sigma

    def drop(self) -> None:
        """Drop the tensors."""
        self._tensors = None


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """Return the number of changes in place of each tensor; 0 in inference mode, which does not count them."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


@dataclass(frozen=True)
class Step:
    """A step of the denoising loop, as `on_step` receives it.

    Args:
        index: of the step, 0 for the first.
        num_steps: number of steps of the call.
        sigma: noise level before the step.
        sigma_next: noise level after the step.
        latents: after the step, `b c h w`, `b c t h w` or of another shape, fp32; not a copy.
        reused: names of the branches in which a step cache skipped blocks.
        evaluation: what `x0` is computed from; None in a step that no loop made.
    """

    index: int
    num_steps: int
    sigma: float
    sigma_next: float
    latents: Tensor
    reused: tuple[str, ...] = ()
    evaluation: Evaluation | None = field(default=None, repr=False, compare=False)

    @property
    def x0(self) -> Tensor:
        """The estimate of the clean latents from the step's first evaluation, a new fp32 tensor of the shape of
        `latents`: `x - sigma * v` of the latents x before the step and their guided velocity v. It is computed when it
        is read, which must be while `on_step` runs; `Pipeline.decode_preview` makes images of it.

        Raises:
            PipelineError: `on_step` has returned, or the solver changed the latents or the velocity in place.
        """
        if self.evaluation is None:
            raise PipelineError("this Step has no x0: it was made without the evaluation of a loop")
        return self.evaluation.x0()


class LoopKeywords(TypedDict, total=False):
    """The arguments that the denoising loop reads, typed for editors: a base of the `TypedDict` of a family's call.
    `LoopArguments` describes them.
    """

    num_inference_steps: int
    cfg_scale: float
    seed: int | Sequence[int] | None
    num_images: int
    output_type: OutputType
    on_step: Callable[[Step], None] | None
    on_progress: Callable[[Progress], None] | None
    cancel: threading.Event | None
    progress_bar_cmd: Callable[[Iterable[Any]], Iterable[Any]]
    step_cache: StepCacheArgument
    attention: AttentionArgument
    solver: str
    guidance: GuidanceArgument
    positive_only_lora: BranchLoRA
    negative_only_lora: BranchLoRA
    return_record: bool


@dataclass(frozen=True, kw_only=True)
class LoopArguments:
    """The arguments that the denoising loop reads. A pipeline class changes defaults by `loop = LoopArguments(...)`.

    Args:
        num_inference_steps: steps of the loop, at least 1 and at most 10000; each calls the network once per branch,
            with some solvers twice.
        cfg_scale: weight of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), in [-1000, 1000]; 1.0 is
            off.
        seed: of the initial noise. With several images, image i has `seed + i`; a list sets the seed of each image;
            None is a random seed.
        num_images: images per prompt, at least 1 and at most 10000.
        output_type: "pil" images, or what else the pipeline returns, such as an `Audio`; "tensor" `b 3 h w` in [-1, 1],
            `b c n` for sound; or "latents" before decoding.
        on_step: called with a `Step` after each step.
        on_progress: called with a `Progress` while the call encodes, denoises and decodes; see
            `diffsynth.core.progress`.
        cancel: checked between units, steps, tiles and pieces of a video; when set, `Cancelled` is raised.
        progress_bar_cmd: wraps the iterator over steps, as `tqdm` does. It is advanced once for each step; the items
            that it gives are not read.
        step_cache: skips blocks whose results hardly change from step to step: a step cache, or its text
            "first_block:threshold=0.1"; None computes everything.
        attention: the attention backend of the networks that the loop calls: a name, or by step a `StepAttention` or
            its text "triton_int8:first=2,last=2"; None is the backend that `use_attention` or the default chooses.
        solver: name of the solver of the denoising ODE: "euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral", or
            one that a plugin adds.
        guidance: how the branches of guidance are combined with `cfg_scale`: a `Guidance`, or a text such as
            "apg:eta=0.5"; None is classifier-free guidance, "cfg".
        positive_only_lora: LoRA that only the branch of the prompt computes, beside the weights and for this call: a
            file, or a dict of its tensors, as `image_to_lora` pipelines return it.
        negative_only_lora: LoRA that only the branch of the negative prompt computes.
        return_record: whether the call returns a `RecordedOutput`: what it returns otherwise, its seeds, also those
            that were random, and the record that a result's file carries.
    """

    num_inference_steps: int = 30
    cfg_scale: float = 1.0
    seed: int | Sequence[int] | None = None
    num_images: int = 1
    output_type: OutputType = "pil"
    on_step: Callable[[Step], None] | None = None
    on_progress: Callable[[Progress], None] | None = None
    cancel: threading.Event | None = None
    progress_bar_cmd: Callable[[Iterable[Any]], Iterable[Any]] = progress_bar
    step_cache: StepCacheArgument = None
    attention: AttentionArgument = None
    solver: str = "euler"
    guidance: GuidanceArgument = None
    positive_only_lora: BranchLoRA = None
    negative_only_lora: BranchLoRA = None
    return_record: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_cache", parse_step_cache(self.step_cache))
        object.__setattr__(self, "attention", parse_step_attention(self.attention))
        if self.guidance is not None:
            object.__setattr__(self, "guidance", parse_guidance(self.guidance))
        for name in ("positive_only_lora", "negative_only_lora"):
            object.__setattr__(self, name, parse_branch_lora(name, getattr(self, name)))
        for name, most in (("num_inference_steps", MAX_STEPS), ("num_images", MAX_RESULTS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{name}={shown(value)}: expected an integer, at least 1 and at most {most}")
        scale = self.cfg_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= 1000:
            raise ValueError(f"cfg_scale={shown(scale)}: expected a number from -1000 to 1000; 1.0 turns guidance off")
        if self.output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type={shown(self.output_type)}: expected one of {', '.join(get_args(OutputType))}"
                f"{did_you_mean(str(self.output_type), get_args(OutputType))}"
            )


LOOP_NAMES = tuple(field.name for field in fields(LoopArguments))

HOST_ARGUMENTS = frozenset({"on_step", "on_progress", "cancel", "progress_bar_cmd", "return_record"})
"""The arguments by which the calling program follows and ends a call: they change no result, are in no record, and JSON
cannot hold them."""

LOOP_VALUES = frozenset({"latents", "sigmas"})
"""Names that the loop itself reads, besides the conditions of the network."""

LOOP_ONLY = frozenset(
    (
        *("num_inference_steps", "cfg_scale", "on_step", "step_cache", "attention", "solver", "guidance"),
        *("positive_only_lora", "negative_only_lora"),
    )
)
"""The arguments that a pipeline without a denoising loop does not have."""


@dataclass(frozen=True)
class Request:
    """A checked call.

    Args:
        loop: the arguments of the loop.
        values: argument -> value of all others; those that are given per image are lists of one entry for each image.
        seeds: one for each image; None is a random seed.
        single: whether the call returns one result rather than a list.
        plan: the memory plan that keeps `vram_limit`; None without a limit.
        is_warmup: whether it is no call of a user, so that observers are not notified.
    """

    loop: LoopArguments
    values: dict[str, Any]
    seeds: list[int | None]
    single: bool
    plan: MemoryPlan | None = None
    is_warmup: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """A dict argument -> value of all arguments of the call, those of the loop included."""
        return {**self.values, **{name: getattr(self.loop, name) for name in LOOP_NAMES}}

    @property
    def batch_size(self) -> int:
        """The number of images of the call: the number of prompts times `num_images`."""
        return len(self.seeds)

    @property
    def branches(self) -> tuple[str, ...]:
        """A tuple of the names of the branches of guidance that the call computes; "cond" alone without guidance."""
        return self.guidance.branches[:1] if self.guidance.is_off(self.loop.cfg_scale) else self.guidance.branches

    @property
    def guidance(self) -> Guidance:
        """The `Guidance` that combines the branches."""
        return parse_guidance(self.loop.guidance)

    def raise_if_cancelled(self) -> None:
        """Raise `Cancelled` if the caller set `cancel`; else do nothing.

        Raises:
            Cancelled: the caller set `cancel`.
        """
        raise_if_set(self.loop.cancel)


def build_signature(
    program: Program, loop: LoopArguments, defaults: Mapping[str, Any], *, has_loop: bool = True
) -> inspect.Signature:
    """Return an `inspect.Signature`: arguments of units in running order, then the loop's; `prompt` is positional.

    Args:
        program: the units.
        loop: the loop's defaults.
        defaults: argument -> default of the model, in place of the unit's or the loop's.
        has_loop: whether the pipeline has a denoising loop; without one the names in `LOOP_ONLY` are left out.
    """
    parameters = [
        inspect.Parameter(
            read.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if read.name == "prompt" else inspect.Parameter.KEYWORD_ONLY,
            annotation=read.annotation,
            default=defaults.get(read.name, read.default),
        )
        for read in program.arguments.values()
    ]
    parameters += [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=field.type,
            default=defaults.get(field.name, getattr(loop, field.name)),
        )
        for field in fields(LoopArguments)
        if has_loop or field.name not in LOOP_ONLY
    ]
    return inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))


def check_request(
    arguments: Mapping[str, Any],
    signature: inspect.Signature,
    program: Program,
    components: Mapping[str, Any],
    *,
    per_image: Sequence[str],
    check_value: Callable[[str, Any], None] | None = None,
    instead: Mapping[str, str] = MappingProxyType({}),
    sources: Mapping[str, str] = MappingProxyType({}),
) -> Request:
    """Check the arguments of a call and return them, completed by defaults, as a `Request`.

    Args:
        arguments: as the caller passed them.
        signature: of the pipeline instance.
        program: its units.
        components: role -> component or None.
        per_image: names of the arguments that take one value, or a list of one for each result; units get a list.
        check_value: function of an argument's name and a value other than its default, which raises for a value that
            the argument does not take; see `diffsynth.runtime.argument_types`.
        instead: see `reject_unknown`.
        sources: role of a tokenizer or processor -> the source of its folder, for the error where it is not loaded.

    Raises:
        TypeError: an unknown argument, with the nearest spelling, or a value of a wrong type.
        ValueError: a value out of range, or lists whose lengths do not fit.
        MissingComponent: an argument of a unit whose role is not loaded.
    """
    reject_unknown(arguments, signature, instead)
    arguments = {name: _plain(value) for name, value in arguments.items()}
    for name, value in arguments.items():
        if check_value is not None and not equals_default(value, signature.parameters[name].default):
            check_value(name, value)
    _reject_missing_roles(arguments, signature, program, components, sources)
    values = {name: parameter.default for name, parameter in signature.parameters.items()} | dict(arguments)
    loop = LoopArguments(**{name: values.pop(name) for name in LOOP_NAMES if name in values})
    single = not any(isinstance(values.get(name), list | tuple) for name in per_image) and loop.num_images == 1
    prompts = max((len(values[name]) for name in per_image if isinstance(values.get(name), list | tuple)), default=1)
    if prompts * loop.num_images > MAX_RESULTS:
        raise ValueError(
            f"the call has {prompts * loop.num_images} results ({prompts} prompts, num_images={loop.num_images}); "
            f"expected at most {MAX_RESULTS}"
        )
    for name in per_image:
        if name in values:
            values[name] = _one_per_image(name, values[name], prompts, loop.num_images)
    seeds = _seeds(loop.seed, prompts * loop.num_images)
    return Request(loop, values, seeds, single and not isinstance(loop.seed, list | tuple))


def refuse_meta(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a tensor on the device meta among the arguments of a call, which only a plan may get."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name} is a tensor on the device meta; expected a tensor with values")


def reject_unknown(
    arguments: Iterable[str], signature: inspect.Signature, instead: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise TypeError for an argument that a signature does not have.

    Args:
        arguments: names of the arguments.
        signature: of the call.
        instead: argument of other programs -> what takes its place, which the error says.

    Raises:
        TypeError: an unknown argument, with what takes its place: by `instead`, else the name that is meant by one of
            other programs, else the nearest spelling.
    """
    for name in arguments:
        if name in instead and name not in signature.parameters:
            raise TypeError(f"unknown argument {name!r}: {instead[name]}")
        if name not in signature.parameters:
            broken = _discovery.broken_plugins()
            raise TypeError(
                f"unknown argument {name!r}{which_is_meant(name, signature.parameters)} "
                f"This pipeline takes: {', '.join(signature.parameters)}"
                + (f"  {_discovery.describe(broken)}" if broken else "")
            )


def _reject_missing_roles(
    arguments: Mapping[str, Any],
    signature: inspect.Signature,
    program: Program,
    components: Mapping[str, Any],
    sources: Mapping[str, str],
) -> None:
    for name, value in arguments.items():
        owners = program.owners(name) if name in program.arguments else []
        is_default = equals_default(value, signature.parameters[name].default)
        if not owners or is_default or any(can_run(owner, components) for owner in owners):
            continue
        missing = [role for role in needed_roles(owners[0]) if components.get(role) is None]
        ways = [
            f"pass {role}_config=ModelConfig.from_source({sources[role]!r}) to from_pretrained()"
            if role in sources
            else "add its file to model_configs"
            for role in missing
        ]
        raise MissingComponent(
            f"argument {name!r} needs {' and '.join(missing)}, which is not loaded; "
            f"{' and '.join(dict.fromkeys(ways))}, or leave {name!r} out"
        )


def _plain(value: Any) -> Any:
    """Return a number of NumPy, or a list or tuple of some, as numbers of Python; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple) and any(isinstance(each, np.generic) for each in value):
        return type(value)(map(_plain, value))
    return value


def _one_per_image(name: str, value: Any, prompts: int, num_images: int) -> list[Any]:
    entries = list(value) if isinstance(value, list | tuple) else [value] * prompts
    if not entries:
        raise ValueError(f"{name} is an empty list; expected one entry for each result")
    if len(entries) != prompts:
        raise ValueError(f"{name} has {len(entries)} entries; expected {prompts}, one for each prompt")
    return [entry for entry in entries for _ in range(num_images)]


def _seeds(seed: int | Sequence[int] | None, batch_size: int) -> list[int | None]:
    if seed is None:
        return [None] * batch_size
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = [seed + index for index in range(batch_size)]
    elif isinstance(seed, list | tuple) and len(seed) == batch_size and all(isinstance(each, int) for each in seed):
        seeds = list(seed)
    else:
        raise ValueError(
            f"seed={shown(seed)}: expected None, an integer, or a list of {batch_size} integers, one per image"
        )
    for each in seeds:
        if not 0 <= each < 2**64:
            raise ValueError(f"seed={shown(each)}: expected an integer from 0 to 2**64 - 1; None is a random seed")
    return list(seeds)
