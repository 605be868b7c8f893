"""The memory options of a pipeline: which policy each component is under, and the choice that the policy "auto" leaves.

`MemoryOptions` holds the caller's `vram_limit` and policies. `choose` replaces "auto" by a preset, once, by means of a
plan; the transfers themselves are `diffsynth.core.vram`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from diffsynth.core.loader import component
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.planning.workload import GIB, check_limit
from diffsynth.core.vram.managed import managed, wrap
from diffsynth.core.vram.policy import AUTO, Auto, Policy
from diffsynth.errors import NotEnoughMemory, Unplannable, did_you_mean
from diffsynth.runtime import architectures
from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.planning import plan_call
from diffsynth.runtime.role import grouped, role_of
from diffsynth.runtime.weight_storage import WeightStorage
from diffsynth.spec import ArchitectureSpec
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

Policies = str | Policy | Auto | Mapping[str, str | Policy | Auto] | None
"""The policy of all components, or a policy for each role: a preset's name, a `Policy`, "auto" or an `Auto`.

"auto" and `Auto` leave the dtype that weights are stored in to a plan. None leaves the policy to the `ModelConfig`s.
"""


@dataclass(frozen=True)
class MemoryOptions:
    """The memory options of the components of one pipeline.

    Args:
        device: the device that computes.
        dtype: of parameters and activations.
        vram_limit: GiB of device memory that a call may take; None is no limit.
        policies: see `Policies`; the eight keys of a `ModelConfig` have precedence.

    Raises:
        ValueError: a limit that is no number of at least 0.
    """

    device: torch.device
    dtype: torch.dtype
    vram_limit: float | None = None
    policies: Policies = field(default=None)

    def __post_init__(self) -> None:
        check_limit("vram_limit", self.vram_limit)

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raise ValueError if a policy is given for a role that the pipeline does not have.

        Raises:
            ValueError: an unknown role.
        """
        for role in self.policies if isinstance(self.policies, Mapping) else ():
            if role_of(role) not in roles:
                raise ValueError(f"policy for {role!r}, which is no role{did_you_mean(role, roles)} {', '.join(roles)}")

    def policy(self, role: str, config: ModelConfig | None = None) -> Policy | None:
        """Return the `Policy` under which a component's weights are offloaded; None if they stay on the device.

        Raises:
            ValueError: an unknown preset, an incomplete set of the eight keys, a device or dtype that is not available,
                or a dtype of computation other than the pipeline's.
        """
        if config is not None:
            spelled = Policy.from_keys(config.vram_keys, device=self.device, dtype=self.dtype)
            if spelled is not None:
                return self._checked(spelled, role)
        wanted = self._wanted(role)
        if wanted is None and self.vram_limit is not None and self.device.type != "cpu":
            wanted = "dynamic"
        if wanted == AUTO or isinstance(wanted, Auto):
            wanted = "dynamic"  # until a plan has chosen
        if wanted is None or wanted == "none":
            return None
        if isinstance(wanted, Policy):
            return self._checked(wanted, role)
        return Policy.preset(wanted, self.device, self.dtype)

    def _checked(self, policy: Policy, role: str) -> Policy:
        if policy.computation.dtype not in (None, self.dtype):
            raise ValueError(
                f"{role}: computation_dtype={policy.computation.dtype}, and the pipeline computes in {self.dtype}; one "
                f"call cannot mix them. Give the pipeline torch_dtype={policy.computation.dtype}, or leave "
                f"computation_dtype out"
            )
        return policy

    def is_auto(self, role: str, config: ModelConfig | None = None) -> bool:
        """Whether a plan chooses the dtype of a component's stored weights: policy "auto", and no keys in `config`."""
        wanted = self._wanted(role)
        is_spelled = config is not None and any(value is not None for value in config.vram_keys.values())
        return not is_spelled and (wanted == AUTO or isinstance(wanted, Auto))

    @property
    def auto_call(self) -> dict[str, Any]:
        """A dict argument -> value: the call that the policy "auto" is chosen for; empty for the default call."""
        every = self.policies.values() if isinstance(self.policies, Mapping) else [self.policies]
        return dict(next((each.call for each in every if isinstance(each, Auto)), {}))

    def with_presets(self, presets: Mapping[str, str], roles: Iterable[str]) -> MemoryOptions:
        """Return `MemoryOptions` whose policies are `presets` (role -> preset) and, for other `roles`, the old ones."""
        fixed = {role: wanted for role in roles if (wanted := self._wanted(role)) is not None}
        return replace(self, policies=fixed | dict(presets))

    def check_limit(self, role: str, module: nn.Module, *, architecture: ArchitectureSpec, policy: Policy) -> None:
        """Raise NotEnoughMemory if a limit is set and a component's largest block and weights outside of blocks exceed
        it.

        Activations are not counted: a plan counts them when the call is known.

        Args:
            role: of the component, for the message.
            module: the component, on meta.
            architecture: of the component.
            policy: of the component.

        Raises:
            NotEnoughMemory: with the GiB that the component needs at least.
        """
        if not self.vram_limit or self.device.type == "cpu":
            return
        blocks = architectures.partition_by(architecture, module)
        dtype = policy.computation.dtype or self.dtype
        least = blocks.rest_bytes(dtype) + max((block.bytes(dtype) for block in blocks.blocks), default=0)
        if least > self.vram_limit * GIB:
            raise NotEnoughMemory(
                f"vram_limit={self.vram_limit} GiB: {role} takes {least / GIB:.2f} GiB for its largest block and "
                "the weights outside of blocks, before any activation. Nothing was loaded. Run: diffsynth plan MODEL"
            )

    def read(
        self, module: nn.Module, source: WeightSource, *, architecture: ArchitectureSpec, policy: Policy
    ) -> nn.Module:
        """Wrap `module` under `policy`, which decides where its weights are read to from `source`, and return it.

        Raises:
            ValueError: see `check_source`.
        """
        component.materialize(module, source, device="meta")
        component.fill_buffers(module)
        wrap(module, policy, source=source, **architectures.cuts(architecture))
        return module

    def wrap_components(self, components: Mapping[str, Any]) -> None:
        """Wrap, for offloading, the modules not wrapped yet that have a policy; warn if a limit has no effect."""
        modules = {role: part for role, part in components.items() if isinstance(part, nn.Module)}
        for role, module in modules.items():
            policy = self.policy(role) if managed(module) is None else None
            if policy is not None:
                wrap(module, policy, **architectures.cuts(architectures.architecture_of(module)))
        if self.vram_limit is not None and not any(managed(module) for module in modules.values()):
            logger.warning("vram_limit=%s has no effect: the pipeline runs on %s", self.vram_limit, self.device)

    def _wanted(self, role: str) -> str | Policy | Auto | None:
        if not isinstance(self.policies, Mapping):
            return self.policies
        return self.policies.get(role, self.policies.get(role_of(role)))


def for_call(policies: Policies, call: Mapping[str, Any]) -> Policies:
    """Return `policies` with each "auto" as an `Auto` of the arguments `call`; those that an `Auto` has already win."""
    if isinstance(policies, Mapping):
        return {role: for_call(policy, call) for role, policy in policies.items()}  # type: ignore[misc]
    if policies == AUTO:
        return Auto(call)
    return Auto({**call, **policies.call}) if isinstance(policies, Auto) else policies


def choose_before_reading(
    build: Callable[..., PlannablePipeline],
    options: MemoryOptions,
    opened: Mapping[str, tuple[nn.Module, WeightSource]],
    processors: Mapping[str, Any],
    configs: Mapping[str, ModelConfig],
) -> MemoryOptions:
    """Return `options` of a pipeline being loaded, with "auto" replaced by "fp8" if a plan gains by it, else by
    "dynamic".

    Args:
        build: makes the pipeline from components by role; roles that are left out are empty.
        options: of the caller.
        opened: role -> the module on meta and the source of its weights.
        processors: role -> processor, loaded already.
        configs: role -> config; a policy that a config spells is not chosen.

    Raises:
        TypeError, ValueError: the call that the policy is chosen for has an argument that the pipeline would refuse.
    """
    if not any(options.is_auto(role, configs.get(role)) for role in opened):
        return options
    modules = {role: component.materialize(*pair, device="meta") for role, pair in opened.items()}
    components = dict(processors) | grouped(modules)
    return choose(build(components, device="meta", torch_dtype=options.dtype), options, configs)


def choose(
    pipe: PlannablePipeline, options: MemoryOptions, configs: Mapping[str, ModelConfig] | None = None
) -> MemoryOptions:
    """Return `options` with "auto" replaced by "fp8" if the plan of a call gains enough by it, else by "dynamic".

    Errors are those of `choose_before_reading`.

    Components that are wrapped already keep their policies. "dynamic" is chosen without a limit, and with a warning
    where the call cannot be planned or the limit cannot be kept.
    """
    configs = configs or {}
    modules = {role: part for role, part in pipe.parts.items() if isinstance(part, nn.Module)}
    unwrapped = [role for role, module in modules.items() if managed(module) is None]
    auto_roles = [role for role in unwrapped if options.is_auto(role, configs.get(role))]
    if not auto_roles:
        return options
    preset = "dynamic"
    if options.vram_limit is not None and options.device.type != "cpu":
        storages = dict.fromkeys(auto_roles, WeightStorage(is_auto=True))
        for role in modules.keys() - storages.keys():
            wrapped = managed(modules[role])
            policy = options.policy(role, configs.get(role)) if wrapped is None else wrapped.policy
            storages[role] = WeightStorage.under(policy, options.dtype)
        preset = _planned_preset(pipe, options, storages)
    return options.with_presets(dict.fromkeys(auto_roles, preset), modules)


def _planned_preset(pipe: PlannablePipeline, options: MemoryOptions, storages: Mapping[str, WeightStorage]) -> str:
    call = options.auto_call
    try:
        plan = plan_call(pipe, call, device=options.device, vram_limit=options.vram_limit, storages=storages)
    except (NotEnoughMemory, Unplannable) as error:
        logger.warning("policy 'auto': weights are not rounded, as no plan was made for the call %s: %s", call, error)
        return "dynamic"
    lowered = len(plan.options) > 1 and plan.storage == plan.options[-1].storage
    preset = "fp8" if lowered else "dynamic"
    compared = "; ".join(map(str, plan.options)) or "the device does not convert float8"
    logger.info("policy 'auto' is %r with vram_limit=%s GiB: %s", preset, options.vram_limit, compared)
    return preset
