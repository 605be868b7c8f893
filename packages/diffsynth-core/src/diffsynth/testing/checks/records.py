"""Records of calls, and the faults of their parts as texts: of `velocity()`, of the steps, and of the result. A
function yields nothing for a part without a fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth.runtime.request import Step
from diffsynth.runtime.schema import arguments_from_json

Size = Mapping[str, int]
"""Those of "height", "width" (pixels) and "num_frames" that a pipeline takes, which its result must have."""


@dataclass
class Call:
    """One call of a pipeline.

    Args:
        size: that the result must have.
        output: the result.
        steps: of the loop, with copies of the latents.
        velocity_faults: faults of the calls of `velocity()`, without repetitions.
    """

    size: Size
    output: Any = None
    steps: list[Step] = field(default_factory=list)
    velocity_faults: list[str] = field(default_factory=list)


def velocity_faults(latents: Tensor, sigma: Any, result: Any) -> Iterator[str]:
    """Yield a text for each fault of one call of `velocity()`: noise levels that are not fp32 `b` in [0, 1], a result
    that is no finite tensor in the shape of the latents.

    Args:
        latents: its first argument, `b c ...`.
        sigma: its second argument.
        result: what it returned.
    """
    batch = len(latents)
    if not isinstance(sigma, Tensor) or sigma.dtype != torch.float32 or tuple(sigma.shape) != (batch,):
        yield f"velocity() was called with sigma={_shown(sigma)}; expected an fp32 tensor ({batch},)"
    elif not ((sigma >= 0) & (sigma <= 1)).all():
        yield f"velocity() was called with sigma={sigma.tolist()}; expected noise levels in [0, 1]"
    if not isinstance(result, Tensor) or result.shape != latents.shape:
        yield f"velocity() returned {_shown(result)} for latents {tuple(latents.shape)}; expected the latents' shape"
    elif not torch.isfinite(result).all():
        yield "velocity() returned NaN or infinity"


def step_faults(steps: Sequence[Step], *, num_steps: int, batch: int = 1) -> Iterator[str]:
    """Yield a text for each fault of a loop: another number of steps, noise levels that do not descend from at most 1
    to exactly 0, latents that are not finite, fp32 and of one shape.

    Args:
        steps: as `on_step` received them.
        num_steps: number of steps that the call asked for.
        batch: number of results that it asked for.
    """
    if len(steps) != num_steps:
        yield f"num_inference_steps={num_steps} gave {len(steps)} steps, by the calls of on_step"
    if not steps:
        return
    levels = [steps[0].sigma, *(step.sigma_next for step in steps)]
    starts = [step.sigma for step in steps]
    if starts != levels[:-1]:
        yield f"the steps start at noise levels {starts} and end at {levels[1:]}; expected each to start where one ends"
    if not 0 < levels[0] <= 1:
        yield f"the schedule starts at noise level {levels[0]}; expected a level in (0, 1]"
    if any(after >= before for before, after in pairwise(levels)):
        yield f"the noise levels are {levels}; expected each to be below the one before"
    if levels[-1] != 0:
        yield f"the schedule ends at noise level {levels[-1]}; expected exactly 0"
    for step in steps:
        latents = step.latents
        if latents.dtype != torch.float32 or latents.shape != steps[0].latents.shape or len(latents) != batch:
            yield f"after step {step.index} the latents are {_shown(latents)}; expected fp32 ({batch}, ...), as before"
        if not torch.isfinite(latents).all():
            yield f"after step {step.index} the latents have NaN or infinity"


def result_faults(output: Any, size: Size, *, kind: str | None) -> Iterator[str]:
    """Yield a text for each fault of a single result of output type "tensor".

    An image must be a tensor `b c h w` and a video one `b c t h w`, of the size that was asked for; several images of
    one result, such as layers, are `b c t h w`, too. A result of another kind must not be None. All tensors in it must
    be finite.

    Args:
        output: the result.
        size: that was asked for.
        kind: "image", "video" or another kind, see `Pipeline.output_kind`; None if it is not known.
    """
    if kind in ("image", "video"):
        several = kind == "video" or (isinstance(output, Tensor) and output.ndim == 5)
        yield from _tensor_faults(output, size, "b c t h w" if several else "b c h w")
    elif output is None:
        yield "the result is None"
    if any(tensor.is_floating_point() and not torch.isfinite(tensor).all() for tensor in _tensors(output)):
        yield "the result has NaN or infinity"


def _tensor_faults(output: Any, size: Size, axes: str) -> Iterator[str]:
    if not isinstance(output, Tensor) or output.ndim != len(axes.split()):
        yield f"output_type='tensor' returned {_shown(output)}; expected a tensor {axes}"
        return
    found = dict(zip(axes.split(), output.shape, strict=True))
    if found["b"] != 1:
        yield f"output_type='tensor' returned {found['b']} results; expected 1"
    yield from _size_faults({"num_frames": found.get("t"), "height": found["h"], "width": found["w"]}, size)


def several_faults(output: Any, size: Size, *, kind: str | None, batch: int) -> Iterator[str]:
    """Yield a text for each fault of the results of a call for several of output type "pil": they are no list of
    `batch`, or, for the kinds "image" and "video", not PIL images or lists of PIL images of the size asked for, such
    as frames or layers.

    Args:
        output: the results.
        size: that was asked for.
        kind: "image", "video" or another kind, see `Pipeline.output_kind`; None if it is not known.
        batch: number of results that were asked for.
    """
    if not isinstance(output, list) or len(output) != batch:
        yield f"output_type='pil' returned {_shown(output)} for num_images={batch}; expected a list of {batch}"
        return
    for one in output if kind in ("image", "video") else ():
        frames = one if kind == "video" or isinstance(one, list) else [one]
        if not isinstance(frames, list) or not frames or not all(isinstance(frame, Image.Image) for frame in frames):
            expected = "lists of PIL images" if kind == "video" else "PIL images or lists of them"
            yield f"output_type='pil' returned a list of {_shown(one)}; expected {expected}"
            return
        sides = {frame.size for frame in frames}
        if len(sides) > 1:
            yield f"the images of one {kind} have the sizes {sorted(sides)}; expected one size"
        width, height = frames[0].size
        yield from _size_faults({"num_frames": len(frames), "height": height, "width": width}, size)


def _size_faults(found: Mapping[str, int | None], size: Size) -> Iterator[str]:
    wrong = [name for name in size if found[name] != size[name]]
    if wrong:
        asked, got = (", ".join(f"{name}={each[name]}" for name in size) for each in (size, found))
        yield f"asked for {asked}, got {got}"


def schema_refusal(schema: Mapping[str, Any], name: str, value: Any) -> Exception | None:
    """Return the error that a call's schema gives for a value of an argument; None if it allows the value."""
    try:
        arguments_from_json(schema, {name: value})
    except (TypeError, ValueError) as error:
        return error
    return None


def is_equal(first: Any, second: Any) -> bool:
    """Return whether two results are equal to the bit; they may be tensors, arrays or PIL images, and lists, tuples and
    dataclasses of them.
    """
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_equal, first, second))
    if is_dataclass(first):
        return all(is_equal(value, getattr(second, name)) for name, value in vars(first).items())
    equal = first == second
    return bool(equal.all() if hasattr(equal, "all") else equal)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif is_dataclass(value):
        for one in vars(value).values():
            yield from _tensors(one)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}: {value!r:.60}"
