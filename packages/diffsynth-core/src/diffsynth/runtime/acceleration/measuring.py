"""Measuring a step cache: one call with it and one without, and the difference of their results."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsynth.runtime.acceleration.step_cache import StepCache
from diffsynth.runtime.acceleration.strategies import parse_step_cache


@dataclass(frozen=True)
class StepCacheReport:
    """The comparison of a call with a step cache and the same call without it.

    Args:
        cache: the step cache.
        num_steps: number of steps of the call.
        reused: branch -> indices of the steps in which blocks were skipped.
        relative_l1: `sum |with - without| / sum |without|` of the final latents.
        cosine: similarity of the final latents; 1 is the same direction.
        seconds, seconds_without: duration of the calls, from arguments to latents.
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
    """Call a pipeline without and with a step cache; return a `StepCacheReport`: difference of latents, both durations.

    Args:
        pipe: a pipeline; nothing of it changes.
        step_cache: the step cache to measure, or its text.
        arguments: of the call, without `output_type` and `on_step`; `seed` is 0 by default. Nothing is decoded.

    Raises:
        Refused: the cache cannot serve this pipeline.
        ValueError: `output_type` or `on_step` is among the arguments.
    """
    if taken := {"output_type", "on_step"} & arguments.keys():
        raise ValueError(f"{sorted(taken)[0]} is set by measure_step_cache itself; leave it out")
    cache = parse_step_cache(step_cache)
    if cache is None:
        raise ValueError("step_cache is None; there is nothing to measure")
    arguments = {"seed": 0, **arguments, "output_type": "latents"}
    pipe.check(**arguments, step_cache=cache)
    reused: list[tuple[str, ...]] = []
    without, seconds_without = _timed(pipe, arguments)
    latents, seconds = _timed(
        pipe, {**arguments, "step_cache": cache, "on_step": lambda step: reused.append(step.reused)}
    )
    return StepCacheReport(
        cache=cache,
        num_steps=len(reused),
        reused={
            branch: tuple(index for index, branches in enumerate(reused) if branch in branches)
            for branch in dict.fromkeys(branch for branches in reused for branch in branches)
        },
        relative_l1=float((latents - without).abs().sum() / without.abs().sum()),
        cosine=float(torch.nn.functional.cosine_similarity(latents.flatten(), without.flatten(), dim=0)),
        seconds=seconds,
        seconds_without=seconds_without,
    )


def _timed(pipe: Any, arguments: dict[str, Any]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    latents = pipe(**arguments).double().cpu()
    return latents, time.perf_counter() - started
