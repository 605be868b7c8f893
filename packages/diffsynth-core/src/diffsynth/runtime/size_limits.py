"""The largest results that a pipeline's device holds, from memory plans of its calls at a few sizes.

Each stage of a call takes `fixed + per_pixel * height * width + per_pixel_of_frame * height * width * num_frames`
bytes: weights, what is made for one frame at a time, and what is made for all frames. Three plans determine the three
numbers, two where there are no frames. Between and beyond these sizes the memory follows the formula closely, because
attention is computed without the matrix of all pairs; `docs/host-apps.md` has figures.

`call_size` has the lower limits that need no plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from diffsynth.core import device as devices
from diffsynth.core.planning import MemoryPlan
from diffsynth.core.planning.workload import GIB
from diffsynth.core.torch_defaults import torch_defaults
from diffsynth.core.vram.managed import managed
from diffsynth.errors import NotEnoughMemory, Unplannable
from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.planning import plan_call
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

SIZES = ("height", "width", "num_frames")


@dataclass(frozen=True)
class StageMemory:
    """The memory that a stage takes, by the size of the result.

    Args:
        name: of the stage.
        fixed: bytes at any size.
        per_pixel: bytes for each pixel of a frame.
        per_pixel_of_frame: bytes for each pixel of every frame.
    """

    name: str
    fixed: float
    per_pixel: float
    per_pixel_of_frame: float = 0.0

    def bytes(self, pixels: int, num_frames: int) -> float:
        """Return the bytes that the stage takes for frames of `pixels` pixels."""
        return self.fixed + pixels * (self.per_pixel + num_frames * self.per_pixel_of_frame)


@dataclass(frozen=True)
class SizeLimits:
    """The sizes of one result that fit a memory.

    Args:
        where: name of the memory, for messages.
        memory: bytes that there are.
        stages: of the call.
        defaults: argument in `SIZES` -> its value in the default call, of those that the pipeline has.
    """

    where: str
    memory: int
    stages: tuple[StageMemory, ...]
    defaults: Mapping[str, int]

    def needed(self, pixels: int, num_frames: int = 1) -> float:
        """Return the bytes that a call takes at its peak, for one result with frames of `pixels` pixels."""
        return max(stage.bytes(pixels, num_frames) for stage in self.stages)

    def most_pixels(self, num_frames: int | None = None) -> int:
        """Return the most pixels of a frame that fit; 0 if nothing fits. None is the default number of frames."""
        frames = self.defaults.get("num_frames", 1) if num_frames is None else num_frames
        return _most(lambda pixels: self.needed(pixels, frames) <= self.memory)

    def most_frames(self) -> int:
        """Return the most frames of the default height and width that fit; 0 if nothing fits."""
        pixels = self.defaults["height"] * self.defaults["width"]
        return _most(lambda frames: self.needed(pixels, frames) <= self.memory)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise NotEnoughMemory if the result of a call does not fit.

        Args:
            values: argument -> value of the call; sizes that are left out have their defaults.

        Raises:
            NotEnoughMemory: with the most pixels that fit.
        """
        sizes = {name: values.get(name, default) for name, default in self.defaults.items()}
        if not all(isinstance(each, int) and each >= 0 for each in sizes.values()):
            return
        pixels, frames = sizes["height"] * sizes["width"], sizes.get("num_frames", 1)
        if (needed := self.needed(pixels, frames)) <= self.memory:
            return
        most = self.most_pixels(frames)
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        of_frames = f" with num_frames={frames}" if "num_frames" in sizes else ""
        raise NotEnoughMemory(
            f"{given}: the call takes about {needed / GIB:.1f} GiB, and {self.where} has {self.memory / GIB:.1f} GiB; "
            f"{f'height times width can be at most {most}' if most else 'no size fits'}{of_frames}. Lower the size, or "
            f"load the pipeline with a policy or another vram_limit"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the limits as JSON values, a dict; `SizeLimits.from_json` reads it."""
        return asdict(self) | {"stages": [asdict(each) for each in self.stages], "defaults": dict(self.defaults)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SizeLimits:
        """Return the `SizeLimits` that `to_json` wrote."""
        return cls(**{**values, "stages": tuple(StageMemory(**each) for each in values["stages"])})


@torch_defaults()
def measure_limits(pipe: PlannablePipeline, device: torch.device, arguments: Mapping[str, Any]) -> SizeLimits | None:
    """Return the `SizeLimits` of a pipeline's calls; None if it has no height and width, cannot be planned, or the
    memory of the device is unknown.

    The memory is the pipeline's `vram_limit`, else all of the device's; what else is in use is not counted. Components
    under a policy count with the least that they can take, and with tiles where a plan may turn them on.

    Args:
        pipe: the pipeline, on meta too.
        device: the device that computes.
        arguments: of the call, such as an image that the model needs; sizes among them replace the defaults.

    Raises:
        TypeError, ValueError: an argument that the call would refuse.
    """
    parameters = pipe.__signature__.parameters
    defaults = {name: arguments.get(name, parameters[name].default) for name in SIZES if name in parameters}
    if not {"height", "width"} <= defaults.keys() or not all(isinstance(each, int) for each in defaults.values()):
        return None
    limit = None if pipe.vram_limit is None or device.type == "cpu" else pipe.vram_limit
    memory = devices.total_memory(device) if limit is None else int(limit * GIB)
    if memory is None:
        return None
    is_offloaded = any(isinstance(part, nn.Module) and managed(part) is not None for part in pipe.parts.values())
    least = {"vram_limit": 0.0} if is_offloaded and device.type != "cpu" else {}
    # Tiles make a stage cheaper above their size only, so plans with tiles are made of larger sizes. All are multiples
    # of 64 pixels, and 4n + 1 frames, which no pipeline rounds up.
    height, width = defaults["height"], defaults["width"]
    if least:
        sizes = [{"height": 2 * height, "width": 2 * width}, {"height": 3 * height, "width": 2 * width}]
    else:
        sizes = [{}, {"height": max(height // 128 * 64, 64), "width": max(width // 128 * 64, 64)}]
    calls = [{**defaults, **each} for each in sizes]
    if "num_frames" in defaults:
        calls.append({**calls[0], "num_frames": defaults["num_frames"] // 8 * 4 + 1})
    try:
        plans = [plan_call(pipe, {**arguments, **sizes}, device=device, **least) for sizes in calls]
    except Unplannable as error:
        logger.warning("the largest sizes are not known, as the call cannot be planned: %s", error)
        return None
    return SizeLimits(_name(device, limit), memory, _stages(plans, calls), defaults)


def _name(device: torch.device, limit: float | None) -> str:
    if limit is not None:
        return f"vram_limit={limit:g}"
    return "this machine" if device.type == "cpu" else str(device)


def _stages(plans: list[MemoryPlan], calls: list[dict[str, int]]) -> tuple[StageMemory, ...]:
    """Return a tuple of the memory of each stage: from plans of a call, of one with another height and width, and,
    where there are frames, of the first with fewer.
    """
    used = [{stage.name: stage.activations for stage in plan.stages} for plan in plans]
    pixels = [call["height"] * call["width"] for call in calls]
    frames = [call.get("num_frames", 1) for call in calls]
    small, large = sorted((0, 1), key=pixels.__getitem__)
    found = []
    for stage in plans[large].stages:
        # Stages below 16 MiB are left out of a plan; they count as if they grew from nothing.
        whole = stage.activations
        part = used[small].get(stage.name, whole * pixels[small] / pixels[large])
        slope = max(whole - part, 0) / max(pixels[large] - pixels[small], 1)
        of_frame = 0.0
        if frames[-1] < frames[0]:
            usual = used[0].get(stage.name, whole * pixels[0] / pixels[large])
            change = max(usual - used[2].get(stage.name, usual * frames[2] / frames[0]), 0)
            of_frame = min(change / (frames[0] - frames[2]) / pixels[0], slope / frames[0])
        beside = (stage.vram or stage.ram) - whole  # weights; on the CPU also what the process has in use
        fixed = beside + whole - slope * pixels[large]
        found.append(StageMemory(stage.name, fixed, slope - of_frame * frames[0], of_frame))
    return tuple(found)


def _most(fits: Any) -> int:
    """Return the largest integer that fits, at most 2**62; 0 if 1 does not fit."""
    low, high = 0, 1
    while fits(high) and high < 2**62:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
