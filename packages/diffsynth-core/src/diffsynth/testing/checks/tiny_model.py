"""A model that is loaded from tiny files, and calls of it that are recorded for the checks."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from diffsynth import registry
from diffsynth._discovery import Declared
from diffsynth.core import device as devices
from diffsynth.core.planning import MemoryPlan
from diffsynth.errors import Unavailable
from diffsynth.runtime.load import load
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.progress import no_progress
from diffsynth.runtime.request import Step
from diffsynth.runtime.writers import output_kind
from diffsynth.spec import ModelSpec, parse_source, resolve
from diffsynth.testing.checks.records import Call, Size, result_faults, velocity_faults
from diffsynth.testing.hub import tiny_hub

STEPS = 2
"""Number of steps of a call."""

PROMPT = "a red apple"

_SMALLEST = ((32, 5), (64, 9), (128, 17))
"""(side in pixels, number of frames) that are tried in turn: a pipeline may refuse a small size or round it up."""


class TinyModel:
    """A model with tiny components in fp32 on the CPU.

    Args:
        declared: the model.
        folder: of a tiny hub that its files are written to.

    Raises:
        ValueError, KeyMismatch: no tiny files can be made; see `tiny_hub`.
        Unavailable: its files have a scheme that the tiny hub does not make.
    """

    def __init__(self, declared: Declared[ModelSpec], folder: Path) -> None:
        self.spec = declared.spec
        self._name, self._base_path = f"{declared.plugin}:{declared.spec.name}", folder
        for source in (*self.spec.components.values(), *self.spec.processors.values()):
            if parse_source(source).scheme not in ("", "package"):
                raise Unavailable(f"no tiny files are made for {source}; only files of the hub and of a package are")
        tiny_hub(folder, self._name)
        self.pipe = self.load()
        self.kind = output_kind(registry.get(self._name))

    def load(self, **memory: Any) -> Pipeline:
        """Return the model as a new `Pipeline`; `memory` is `policy` and `vram_limit` of `diffsynth.load`."""
        settings = {"DIFFSYNTH_MODEL_BASE_PATH": str(self._base_path), "DIFFSYNTH_SKIP_DOWNLOAD": "true"}
        with mock.patch.dict(os.environ, settings):
            return load(self._name, device="cpu", torch_dtype=torch.float32, base_path=self._base_path, **memory)

    def arguments(self, size: Size, **changed: Any) -> dict[str, Any]:
        """Return a dict argument -> value: a call of two steps with seed 0 that gives a result of `size`, with the
        model's `tiny_inputs`; `changed` has precedence. Arguments that the pipeline does not have are left out.
        """
        usual = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 0, "progress_bar_cmd": no_progress}
        parameters = self.pipe.__signature__.parameters
        call: dict[str, Any] = {name: value for name, value in usual.items() if name in parameters} | dict(size)
        if self.spec.tiny_inputs:
            call |= resolve(self.spec.tiny_inputs)(dict(size))
        return call | changed

    def call(self, size: Size, *, pipe: Pipeline | None = None, **changed: Any) -> Call:
        """Call the pipeline (or another `pipe` of this model) and return the record of the call.

        Raises:
            AssertionError: the call failed after `velocity()` had returned a wrong value.
            Exception: of the call.
        """
        pipe, record = pipe or self.pipe, Call(size)

        def on_step(step: Step) -> None:
            record.steps.append(replace(step, latents=step.latents.clone()))

        if pipe.has_loop():
            changed["on_step"] = on_step
        try:
            with _watched_velocity(pipe, record.velocity_faults):
                record.output = pipe(**self.arguments(size, **changed))
        except Exception as error:
            if record.velocity_faults:
                faults = "; ".join(record.velocity_faults)
                raise AssertionError(f"{faults}. The call ended with {type(error).__name__}: {error}") from error
            raise
        return record

    @functools.cached_property
    def first(self) -> Call:
        """The `Call` of output type "tensor" at the smallest size that the pipeline neither refuses nor rounds; the
        smallest that it does not refuse, if it rounds all.
        """
        made, refused = [], []
        for size in self._possible_sizes():
            try:
                call = self.call(size, output_type="tensor")
            except ValueError as error:
                refused.append(error)
                continue
            made.append(call)
            if not list(result_faults(call.output, size, kind=self.kind)):
                return call
        if not made:
            raise refused[0]
        return made[0]

    @property
    def second_size(self) -> Size:
        """A `Size` other than that of the first call: height and width are exchanged, and there are more frames."""
        size = self.first.size
        exchanged = {"height": "width", "width": "height"}
        changed = {name: size[exchanged[name]] for name in exchanged if name in size}
        return {**changed, **({"num_frames": 2 * size["num_frames"] - 1} if "num_frames" in size else {})}

    @property
    def first_sample(self) -> Any:
        """The sample of the first call: see `sample_of`."""
        return self.first.steps[-1].latents if self.pipe.has_loop() else self.first.output

    @functools.cached_property
    def sample(self) -> Any:
        """The sample of another call with the arguments of the first; see `sample_of`."""
        return self.sample_of()

    @functools.cached_property
    def sample_of_another_seed(self) -> Any:
        """The sample of seed 1, see `sample_of`; the first call has seed 0."""
        return self.sample_of(seed=1)

    def sample_of(self, **changed: Any) -> Any:
        """Return the latents of a call at the size of the first with `changed` arguments, a tensor; or, for a pipeline
        without a loop, its result. `velocity()` is not watched, so that several threads may do this.
        """
        output_type = "latents" if self.pipe.has_loop() else "tensor"
        return self.pipe(**self.arguments(self.first.size, output_type=output_type, **changed))

    @functools.cached_property
    def plan(self) -> MemoryPlan:
        """The `MemoryPlan` of the first call on an accelerator, without a limit."""
        return self.plan_of()

    def plan_of(self, **limits: Any) -> MemoryPlan:
        """Return the `MemoryPlan` of the first call on an accelerator, which need not be in this machine.

        Args:
            limits: `vram_limit` and others of `Pipeline.plan`.
        """
        return self.pipe.plan(device=devices.ACCELERATORS[0], **limits, **self.arguments(self.first.size))

    def _possible_sizes(self) -> Iterator[Size]:
        taken = self.pipe.__signature__.parameters.keys() & {"height", "width", "num_frames"}
        properties = self.pipe.schema()["properties"]
        least = {name: properties[name].get("minimum", 1) for name in taken}
        for side, frames in _SMALLEST if taken else ((0, 0),):
            size = {"height": side, "width": 2 * side, "num_frames": frames}
            yield {name: max(size[name], least[name]) for name in sorted(taken)}


@contextmanager
def _watched_velocity(pipe: Pipeline, faults: list[str]) -> Iterator[None]:
    """Add the faults of each call of `pipe.velocity()` to `faults`, without repetitions, inside the context."""
    plain = pipe.velocity

    def velocity(latents: Tensor, sigma: Tensor, *rest: Any, **conditions: Any) -> Tensor:
        result = plain(latents, sigma, *rest, **conditions)
        faults.extend(fault for fault in velocity_faults(latents, sigma, result) if fault not in faults)
        return result

    vars(pipe)["velocity"] = velocity
    try:
        yield
    finally:
        del vars(pipe)["velocity"]
