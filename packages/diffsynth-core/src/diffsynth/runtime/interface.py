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
        """Check the arguments of a call without making it."""

    def call_values(self, request: Request) -> CallValues:
        """Return the values that the units of a call start from."""

    def roles_at(self, sigma: float, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the roles that `velocity()` calls at a noise level."""

    def denoise(self, request: Request, values: CallValues) -> Tensor:
        """Return the latents at the end of the schedule."""

    def decode(self, request: Request, values: CallValues, latents: Tensor) -> Any:
        """Return the output of the output units."""
