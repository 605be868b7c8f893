"""What a step cache saves and what it costs: the same call with it and without."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsynth.runtime.acceleration.choice import parse_step_cache
from diffsynth.runtime.acceleration.step_cache import StepCache

if TYPE_CHECKING:
    from diffsynth.runtime.request import Step


@dataclass(frozen=True)
class StepCacheReport:
    """One call with a step cache, beside the same call without it.

    Args:
        cache: the settings.
        num_steps: of the schedule.
        reused: branch -> indices of the steps in which it reused something.
        relative_l1: `sum |with - without| / sum |without|` of the final latents.
        cosine: of the angle between them; 1 is the same direction.
        seconds, seconds_without: from arguments to latents.
    """

    cache: StepCache
    num_steps: int
    reused: dict[str, tuple[int, ...]]
    relative_l1: float
    cosine: float
    seconds: float
    seconds_without: float

    def __str__(self) -> str:
        lines = [
            f"{branch}: {len(steps)} of {self.num_steps} steps reused ({', '.join(map(str, steps))})"
            for branch, steps in self.reused.items()
        ]
        lines = lines or [f"nothing reused in {self.num_steps} steps"]
        return "\n".join(
            [
                repr(self.cache),
                *lines,
                f"latents differ by {self.relative_l1:.2e} (relative L1), cosine {self.cosine:.6f}",
                f"{self.seconds:.2f} s with the cache, {self.seconds_without:.2f} s without",
            ]
        )


def measure_step_cache(pipe: Any, step_cache: StepCache | str, **arguments: Any) -> StepCacheReport:
    """Make a call without and with a step cache and compare their latents.

    Args:
        pipe: a pipeline; nothing of it changes.
        step_cache: what to measure.
        arguments: of the call; a seed is 0 unless it is given, and nothing is decoded.

    Raises:
        Refused: the cache cannot serve this pipeline.
        ValueError: `output_type` or `on_step` is given.
    """
    if taken := {"output_type", "on_step"} & arguments.keys():
        raise ValueError(f"{sorted(taken)[0]} is given; measuring needs it for itself")
    cache = parse_step_cache(step_cache)
    if cache is None:
        raise ValueError("step_cache is None; there is nothing to measure")
    arguments = {"seed": 0, **arguments, "output_type": "latents"}
    pipe.check(**arguments, step_cache=cache)
    without, seconds_without, _ = _timed(pipe, arguments)
    latents, seconds, steps = _timed(pipe, {**arguments, "step_cache": cache})
    branches = dict.fromkeys(branch for step in steps for branch in step.reused)
    return StepCacheReport(
        cache=cache,
        num_steps=steps[-1].num_steps,
        reused={name: tuple(step.index for step in steps if name in step.reused) for name in branches},
        relative_l1=float((latents - without).abs().sum() / without.abs().sum()),
        cosine=float(torch.nn.functional.cosine_similarity(latents.flatten(), without.flatten(), dim=0)),
        seconds=seconds,
        seconds_without=seconds_without,
    )


def _timed(pipe: Any, arguments: dict[str, Any]) -> tuple[Tensor, float, list[Step]]:
    steps: list[Step] = []
    started = time.perf_counter()
    latents = pipe(**arguments, on_step=steps.append).double().cpu()
    return latents, time.perf_counter() - started, steps
