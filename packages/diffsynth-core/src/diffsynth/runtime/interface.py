"""The interfaces of a pipeline that its loop and the planner use.

`Pipeline` imports both, so both are written against these protocols and do not import `Pipeline`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffsynth.core.lora import LoRA
from diffsynth.core.parallel import ProcessMesh
from diffsynth.core.planning import MemoryPlan
from diffsynth.runtime.branch_lora import BranchLoRASession
from diffsynth.runtime.feature import Condition, StepContext
from diffsynth.runtime.request import Request
from diffsynth.runtime.role import Processor, Role
from diffsynth.runtime.stage_offloader import ExpertSwitcher
from diffsynth.runtime.unit import CallValues, Program


class LoopPipeline(Protocol):
    """A pipeline whose denoising loop can be run; see `diffsynth.runtime.pipeline.Pipeline`."""

    components: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    mesh: ProcessMesh
    model_name: str | None
    prediction: ClassVar[str]
    loop_roles: ClassVar[tuple[str, ...]]
    roles: Mapping[str, Role | Processor]
    program: Program
    condition_rules: dict[str, Condition]

    @property
    def parts(self) -> dict[str, Any]:
        """A dict role -> component, with one entry for each member of a role of many: "controlnet[0]"."""

    @property
    def all_loop_roles(self) -> tuple[str, ...]:
        """A tuple of the roles whose networks the loop may call; of a role of many, its members."""

    def has_loop(self) -> bool:
        """Whether the pipeline has a denoising loop."""

    def roles_at(self, step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a tuple of the roles whose networks `velocity()` calls in a step."""

    def velocity(self, latents: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        """Return the velocity `noise - x0`, a tensor of the shape of `latents`."""

    def velocity_arguments(self, conditions: Mapping[str, Any], step: StepContext) -> dict[str, Any]:
        """Return a dict of the keyword arguments of `velocity()` for these conditions in a step."""

    def branch_loras(self, loras: Mapping[str, Sequence[LoRA]], branches: Sequence[str]) -> BranchLoRASession:
        """Return the `BranchLoRASession` of a call with LoRAs of single branches."""

    def switch_experts(self, roles: Sequence[tuple[str, ...]], plan: MemoryPlan | None) -> ExpertSwitcher:
        """Return an `ExpertSwitcher` that loads the components of each step of the loop."""


class PlannablePipeline(LoopPipeline, Protocol):
    """A pipeline whose calls can be planned; see `diffsynth.runtime.pipeline.Pipeline`."""

    per_image: tuple[str, ...]
    plan_cache: Any
    vram_limit: float | None
    size_limits: Any
    __signature__: inspect.Signature

    def check(self, **arguments: Any) -> Request:
        """Return the checked arguments of a call as a `Request`, without making the call."""

    def call_values(self, request: Request) -> CallValues:
        """Return the `CallValues` (values by name, shared and by branch) that the units of a call start from."""

    def known_values(self, request: Request) -> dict[str, Any]:
        """Return a dict name -> value of what is known of a call before anything runs."""

    def stages(self, request: Request) -> Sequence[Any]:
        """Return the `Stage`s of a call, in running order."""
