"""A policy that is left open, "auto": a plan chooses how weights are stored, once, before they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from diffsynth.core.loader import component
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.reader.source import ComponentSource
from diffsynth.core.vram.managed import managed
from diffsynth.errors import NotEnoughMemory, Unplannable
from diffsynth.runtime.memory_options import MemoryOptions
from diffsynth.runtime.planning import plan_call
from diffsynth.runtime.weight_storage import WeightStorage

if TYPE_CHECKING:
    from diffsynth.runtime.pipeline import Pipeline

logger = logging.getLogger(__name__)


def choose_before_reading(
    cls: type[Pipeline],
    options: MemoryOptions,
    opened: Mapping[str, tuple[nn.Module, ComponentSource]],
    processors: Mapping[str, Any],
    configs: Mapping[str, ModelConfig],
) -> MemoryOptions:
    """The placing of a pipeline that is being loaded, with nothing open.

    Args:
        cls: the pipeline.
        placing: as the caller wants it.
        opened: modules on meta and where their weights are, by role.
        processors: that are loaded already.
        configs: by role; a policy that one spells is not open.

    Raises:
        TypeError, ValueError: the call that is to be chosen for has an argument that the pipeline would refuse.
    """
    if not any(options.is_open(role, configs.get(role)) for role in opened):
        return options
    modules = {role: component.materialize(*pair, device="meta") for role, pair in opened.items()}
    parts = dict.fromkeys(cls.roles) | dict(processors) | modules
    return choose(cls(parts, device="meta", torch_dtype=options.dtype), options, configs)


def choose(pipe: Pipeline, options: MemoryOptions, configs: Mapping[str, ModelConfig] | None = None) -> MemoryOptions:
    """The placing of a pipeline with nothing open; arguments and errors as above.

    Components that are wrapped already are as they are. Without a limit nothing is rounded. Where the call cannot be
    planned, or not kept within the limit in any way, nothing is rounded either, and a warning says so.
    """
    configs = configs or {}
    modules = {role: part for role, part in pipe.components.items() if isinstance(part, nn.Module)}
    loose = [role for role, module in modules.items() if managed(module) is None]
    open_roles = [role for role in loose if options.is_open(role, configs.get(role))]
    if not open_roles:
        return options
    preset = "dynamic"
    if options.vram_limit is not None and options.device.type != "cpu":
        storages = dict.fromkeys(open_roles, WeightStorage(is_open=True))
        for role in modules.keys() - storages.keys():
            held = managed(modules[role])
            policy = options.policy(role, configs.get(role)) if held is None else held.policy
            storages[role] = WeightStorage.under(policy, options.dtype)
        preset = _planned(pipe, options, storages)
    return options.settled(dict.fromkeys(open_roles, preset), modules)


def _planned(pipe: Pipeline, options: MemoryOptions, storages: Mapping[str, WeightStorage]) -> str:
    call = options.open_call
    try:
        plan = plan_call(pipe, call, device=options.device, vram_limit=options.vram_limit, storages=storages)
    except (NotEnoughMemory, Unplannable) as error:
        logger.warning("policy 'auto': weights are not rounded, as no plan was made for the call %s: %s", call, error)
        return "dynamic"
    lowered = len(plan.options) > 1 and plan.storage == plan.options[-1].storage
    preset = "fp8" if lowered else "dynamic"
    weighed = "; ".join(map(str, plan.options)) or "the device converts no float8"
    logger.info("policy 'auto' is %r with vram_limit=%s GiB: %s", preset, options.vram_limit, weighed)
    return preset
