"""Which policy a component is under, and where it may be cut: from declarations to `diffsynth.core.vram.wrap`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.reader.source import ComponentSource
from diffsynth.core.vram.managed import managed, wrap
from diffsynth.core.vram.partition import Partition, partition
from diffsynth.core.vram.policy import AUTO, Auto, Policy
from diffsynth.errors import NotEnoughMemory, did_you_mean
from diffsynth.spec import ArchitectureSpec, resolve

logger = logging.getLogger(__name__)

Policies = str | Policy | Auto | Mapping[str, str | Policy | Auto] | None
"""A preset's name or a policy for every component, or for the roles named; None leaves it to the configs.

"auto", or an `Auto`, leaves the dtype that weights are stored in to a plan.
"""


@dataclass(frozen=True)
class MemoryOptions:
    """How the components of one pipeline are held.

    Args:
        device: where computation happens.
        dtype: of parameters and activations.
        vram_limit: GiB, or None for no limit.
        policies: for all, or by role; the eight keys of a `ModelConfig` have precedence.
    """

    device: torch.device
    dtype: torch.dtype
    vram_limit: float | None = None
    policies: Policies = field(default=None)

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Refuse policies for roles that there are not.

        Raises:
            ValueError: naming the role.
        """
        for role in self.policies if isinstance(self.policies, Mapping) else ():
            if role not in roles:
                raise ValueError(f"policy for {role!r}, which is no role{did_you_mean(role, roles)} {', '.join(roles)}")

    def policy(self, role: str, config: ModelConfig | None = None) -> Policy | None:
        """Of a component; None if it stays on the device.

        Raises:
            ValueError: an unknown preset, a hole in the keys, a device or dtype that is not there.
        """
        if config is not None:
            spelled = Policy.from_keys(config.vram_keys, device=self.device, dtype=self.dtype)
            if spelled is not None:
                return spelled
        wanted = self._wanted(role)
        if wanted is None and self.vram_limit is not None and self.device.type != "cpu":
            wanted = "dynamic"
        if wanted == AUTO or isinstance(wanted, Auto):
            wanted = "dynamic"  # until a plan has chosen
        if wanted is None or wanted == "none":
            return None
        return wanted if isinstance(wanted, Policy) else Policy.preset(wanted, self.device, self.dtype)

    def is_open(self, role: str, config: ModelConfig | None = None) -> bool:
        """Whether a plan is to choose how the weights of a component are stored."""
        wanted = self._wanted(role)
        is_spelled = config is not None and any(value is not None for value in config.vram_keys.values())
        return not is_spelled and (wanted == AUTO or isinstance(wanted, Auto))

    @property
    def open_call(self) -> dict[str, Any]:
        """The arguments of the call that it is chosen for."""
        every = self.policies.values() if isinstance(self.policies, Mapping) else [self.policies]
        return dict(next((each.call for each in every if isinstance(each, Auto)), {}))

    def settled(self, presets: Mapping[str, str], roles: Iterable[str]) -> MemoryOptions:
        """The same with these presets in place of what was open; other roles are as they were."""
        fixed = {role: wanted for role in roles if (wanted := self._wanted(role)) is not None}
        return replace(self, policies=fixed | dict(presets))

    def check_limit(self, role: str, module: nn.Module, *, architecture: ArchitectureSpec, policy: Policy) -> None:
        """Refuse a limit that is too small for the largest block alone; what a call takes beside it is planned then.

        Args:
            role: of the component.
            module: on meta.
            architecture, policy: of it.

        Raises:
            NotEnoughMemory: with the least that it takes.
        """
        if not self.vram_limit or self.device.type == "cpu":
            return
        parts = partition_by(architecture, module)
        dtype = policy.computation.dtype or self.dtype
        least = parts.rest_bytes(dtype) + max((block.bytes(dtype) for block in parts.blocks), default=0)
        if least > self.vram_limit * 2**30:
            raise NotEnoughMemory(
                f"vram_limit={self.vram_limit} GiB: {role} takes {least / 2**30:.2f} GiB for its largest block and "
                "what stays beside it, before any activation. Nothing was loaded. Run: diffsynth plan MODEL"
            )

    def _wanted(self, role: str) -> str | Policy | Auto | None:
        return self.policies.get(role) if isinstance(self.policies, Mapping) else self.policies

    def read(
        self,
        module: nn.Module,
        source: ComponentSource,
        *,
        architecture: ArchitectureSpec,
        policy: Policy,
    ) -> nn.Module:
        """A module whose weights wait where its policy says; `open_component` gave the first two.

        Raises:
            ValueError: see `check_source`.
        """
        component.materialize(module, source, device="meta")
        component.fill_buffers(module)
        wrap(module, policy, source=source, **cuts(architecture))
        return module

    def hold(self, components: Mapping[str, Any]) -> None:
        """Wrap modules that are in memory and not wrapped yet, where a limit or a policy asks for it."""
        modules = {role: part for role, part in components.items() if isinstance(part, nn.Module)}
        for role, module in modules.items():
            policy = self.policy(role) if managed(module) is None else None
            if policy is not None:
                wrap(module, policy, **cuts(architecture_of(module)))
        if self.vram_limit is not None and not any(managed(module) for module in modules.values()):
            logger.warning("vram_limit=%s has no effect: the pipeline runs on %s", self.vram_limit, self.device)


def for_call(policies: Policies, call: Mapping[str, Any]) -> Policies:
    """The same, and what is open in it is chosen for a call with these arguments, unless it says others itself."""
    if isinstance(policies, Mapping):
        return {role: for_call(policy, call) for role, policy in policies.items()}  # type: ignore[misc]
    if policies == AUTO:
        return Auto(call)
    return Auto({**call, **policies.call}) if isinstance(policies, Auto) else policies


def architecture_of(module: nn.Module) -> ArchitectureSpec | None:
    """The declaration of a module's class, if there is one."""
    reference = f"{type(module).__module__}:{type(module).__qualname__}"
    declared = (each.spec for each in _discovery.catalog().architectures)
    return next((spec for spec in declared if spec.module == reference), None)


def partition_by(architecture: ArchitectureSpec | None, module: nn.Module) -> Partition:
    """A module in the parts that `wrap` would cut it into."""
    return partition(module, **{name: cut for name, cut in cuts(architecture).items() if name != "high_precision"})


def cuts(architecture: ArchitectureSpec | None) -> dict[str, Any]:
    """The arguments of `wrap` that a declaration makes, with the layer classes that plugins declared whole."""
    declared = [each.spec for each in _discovery.catalog().layer_wrappers]
    layers = [spec.layer for spec in declared if spec.atomic]
    # A class whose module nobody imported has no instances, so it is left alone.
    atomic = [resolve(layer) for layer in layers if layer.partition(":")[0] in sys.modules]
    if architecture is None:
        return {"atomic": tuple(atomic)}
    return {
        "repeated": architecture.repeated_blocks,
        "atomic": (*atomic, *(resolve(layer) for layer in architecture.atomic)),
        "high_precision": architecture.high_precision,
    }
