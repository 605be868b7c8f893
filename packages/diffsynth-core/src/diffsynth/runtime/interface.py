"""The interface of a pipeline that the planner uses.

`Pipeline` imports the planner, so the planner is written against this protocol and does not import `Pipeline`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsynth.runtime.request import Request
from diffsynth.runtime.unit import CallValues, Program, Unit


class PlannablePipeline(Protocol):
    """A pipeline whose stages can be run one by one; see `diffsynth.runtime.pipeline.Pipeline`."""

    components: dict[str, Any]
    dtype: torch.dtype
    program: Program
    roles: Mapping[str, Any]
    output_units: tuple[Unit, ...]
    __signature__: inspect.Signature

    def check(self, **arguments: Any) -> Request:
        """Return the checked arguments of a call as a `Request`, without making the call."""

    def call_values(self, request: Request) -> CallValues:
        """Return the `CallValues` (values by name, shared and by branch) that the units of a call start from."""

    def roles_at(self, sigma: float, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a tuple of the roles (component names) that `velocity()` calls at a noise level."""

    def denoise(self, request: Request, values: CallValues) -> Tensor:
        """Run the denoising loop and return the latents, a tensor, at the end of the schedule."""

    def decode(self, request: Request, values: CallValues, latents: Tensor) -> Any:
        """Run the output units and return what they output, such as images."""
