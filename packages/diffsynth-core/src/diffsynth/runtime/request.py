"""One call's arguments, checked and completed before anything expensive happens."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor

from diffsynth import _discovery
from diffsynth.core.planning import MemoryPlan
from diffsynth.errors import MissingComponent, did_you_mean
from diffsynth.runtime.acceleration.choice import StepCacheArgument, parse_step_cache
from diffsynth.runtime.acceleration.step_attention import AttentionArgument, parse_step_attention
from diffsynth.runtime.progress import progress_bar
from diffsynth.runtime.unit import Program, can_run, needed_roles

OutputType = Literal["pil", "tensor", "latents"]


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after each step.

    Args:
        index: 0 for the first step.
        num_steps: how many there are.
        sigma: the noise level this step started from.
        sigma_next: the level it reached.
        latents: `b c h w` (or `b c t h w`), not a copy.
        reused: the branches in which a step cache left blocks out.
    """

    index: int
    num_steps: int
    sigma: float
    sigma_next: float
    latents: Tensor
    reused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoopArguments:
    """What the denoising loop itself reads. A pipeline class sets `loop = LoopArguments(...)` to change defaults.

    Args:
        num_inference_steps: calls of the network per branch, at least 1.
        cfg_scale: weight of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1.0 is off.
        seed: of the initial noise. With several images, image i has `seed + i`; a list gives each its own; None draws.
        num_images: images per prompt, at least 1.
        output_type: "pil" images, "tensor" `b 3 h w` in [-1, 1], or "latents" before decoding.
        on_step: called with a `Step` after each step.
        cancel: checked between units and between steps; when set, `Cancelled` is raised.
        progress_bar_cmd: wraps the iterator over steps, as `tqdm` does.
        step_cache: leave out blocks that would repeat earlier steps: a step cache, or its text
            "first_block:threshold=0.1"; None computes everything.
        attention: the attention backend of the networks that the loop calls: a name, or by step a `StepAttention` or
            its text "triton_int8:first=2,last=2"; None leaves it to `use_attention` and what comes after that.
    """

    num_inference_steps: int = 30
    cfg_scale: float = 1.0
    seed: int | Sequence[int] | None = None
    num_images: int = 1
    output_type: OutputType = "pil"
    on_step: Callable[[Step], None] | None = None
    cancel: threading.Event | None = None
    progress_bar_cmd: Callable[[Iterable[Any]], Iterable[Any]] = progress_bar
    step_cache: StepCacheArgument = None
    attention: AttentionArgument = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_cache", parse_step_cache(self.step_cache))
        object.__setattr__(self, "attention", parse_step_attention(self.attention))
        for name in ("num_inference_steps", "num_images"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
        if isinstance(self.cfg_scale, bool) or not isinstance(self.cfg_scale, int | float):
            raise ValueError(f"cfg_scale={self.cfg_scale!r}: expected a number; 1.0 turns guidance off")
        if self.output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type={self.output_type!r}: expected one of {', '.join(get_args(OutputType))}"
                f"{did_you_mean(str(self.output_type), get_args(OutputType))}"
            )


LOOP_NAMES = tuple(field.name for field in fields(LoopArguments))


@dataclass(frozen=True)
class Request:
    """A checked call: every argument has a value, and the batch is laid out image by image.

    `plan` is how a memory limit is kept, if there is one.
    """

    loop: LoopArguments
    values: dict[str, Any]
    seeds: list[int | None]
    single: bool
    plan: MemoryPlan | None = None

    @property
    def batch_size(self) -> int:
        """Number of images: prompts times `num_images`."""
        return len(self.seeds)


def build_signature(program: Program, loop: LoopArguments, defaults: Mapping[str, Any]) -> inspect.Signature:
    """The arguments of a pipeline: units' first, in running order, then the loop's; all keyword-only but `prompt`."""
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
    ]
    return inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))


def check_request(
    arguments: Mapping[str, Any],
    signature: inspect.Signature,
    program: Program,
    components: Mapping[str, Any],
    *,
    per_image: Sequence[str],
) -> Request:
    """Check a call's arguments and lay out its batch.

    Args:
        arguments: what the caller gave.
        signature: of the pipeline instance.
        program: its units.
        components: role -> what is loaded.
        per_image: argument names that take one text or a list of them; they reach the units as lists, one per image.

    Raises:
        TypeError: an unknown argument, with the nearest spelling.
        ValueError: a value out of range, or lists whose lengths do not fit.
        MissingComponent: an argument whose role is not loaded.
    """
    reject_unknown(arguments, signature)
    _reject_unserved(arguments, signature, program, components)
    values = {name: parameter.default for name, parameter in signature.parameters.items()} | dict(arguments)
    loop = LoopArguments(**{name: values.pop(name) for name in LOOP_NAMES})
    single = not any(isinstance(values.get(name), list | tuple) for name in per_image) and loop.num_images == 1
    prompts = max((len(values[name]) for name in per_image if isinstance(values.get(name), list | tuple)), default=1)
    for name in per_image:
        if name in values:
            values[name] = _one_per_image(name, values[name], prompts, loop.num_images)
    seeds = _seeds(loop.seed, prompts * loop.num_images)
    return Request(loop, values, seeds, single and not isinstance(loop.seed, list | tuple))


def reject_unknown(arguments: Iterable[str], signature: inspect.Signature) -> None:
    """Raise on an argument that the signature does not have, with the nearest spelling.

    Raises:
        TypeError: see above.
    """
    for name in arguments:
        if name not in signature.parameters:
            broken = _discovery.problems()
            raise TypeError(
                f"unknown argument {name!r}{did_you_mean(name, signature.parameters)} "
                f"This pipeline takes: {', '.join(signature.parameters)}"
                + (f"  {_discovery.describe(broken)}" if broken else "")
            )


def _reject_unserved(
    arguments: Mapping[str, Any], signature: inspect.Signature, program: Program, components: Mapping[str, Any]
) -> None:
    for name, value in arguments.items():
        owners = program.owners(name)
        if not owners or value is signature.parameters[name].default or any(can_run(o, components) for o in owners):
            continue
        missing = [role for role in needed_roles(owners[0]) if components.get(role) is None]
        raise MissingComponent(
            f"argument {name!r} needs {' and '.join(missing)}, which is not loaded; "
            f"add its file to model_configs, or leave {name!r} out"
        )


def _one_per_image(name: str, value: Any, prompts: int, num_images: int) -> list[str]:
    texts = list(value) if isinstance(value, list | tuple) else [value] * prompts
    if len(texts) != prompts or not texts:
        raise ValueError(f"{name} has {len(texts)} entries; expected {prompts}, one for each prompt")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name}={text!r}: expected text, got {type(text).__name__}")
    return [text for text in texts for _ in range(num_images)]


def _seeds(seed: int | Sequence[int] | None, batch_size: int) -> list[int | None]:
    if seed is None:
        return [None] * batch_size
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [seed + i for i in range(batch_size)]
    if isinstance(seed, list | tuple) and len(seed) == batch_size and all(isinstance(s, int) for s in seed):
        return list(seed)
    raise ValueError(f"seed={seed!r}: expected None, an integer, or a list of {batch_size} integers, one per image")
