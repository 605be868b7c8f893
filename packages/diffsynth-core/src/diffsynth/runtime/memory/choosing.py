"""A policy that is left open, "auto": a plan chooses how weights are stored, once, before they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from diffsynth.core.loader import load
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.reading.source import ComponentSource
from diffsynth.core.vram.managed import managed
from diffsynth.errors import NotEnoughMemory, Unplannable
from diffsynth.runtime.memory.placing import Placing
from diffsynth.runtime.memory.planning import plan_call
from diffsynth.runtime.memory.storage import Waiting

if TYPE_CHECKING:
    from diffsynth.runtime.pipeline import Pipeline

logger = logging.getLogger(__name__)


def choose_before_reading(
    cls: type[Pipeline],
    placing: Placing,
    opened: Mapping[str, tuple[nn.Module, ComponentSource]],
    processors: Mapping[str, Any],
    configs: Mapping[str, ModelConfig],
) -> Placing:
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
    if not any(placing.is_open(role, configs.get(role)) for role in opened):
        return placing
    modules = {role: load.materialize(*pair, device="meta") for role, pair in opened.items()}
    parts = dict.fromkeys(cls.roles) | dict(processors) | modules
    return choose(cls(parts, device="meta", torch_dtype=placing.dtype), placing, configs)


def choose(pipe: Pipeline, placing: Placing, configs: Mapping[str, ModelConfig] | None = None) -> Placing:
    """The placing of a pipeline with nothing open; arguments and errors as above.

    Components that are wrapped already are as they are. Without a limit nothing is rounded. Where the call cannot be
    planned, or not kept within the limit in any way, nothing is rounded either, and a warning says so.
    """
    configs = configs or {}
    modules = {role: part for role, part in pipe.components.items() if isinstance(part, nn.Module)}
    loose = [role for role, module in modules.items() if managed(module) is None]
    open_roles = [role for role in loose if placing.is_open(role, configs.get(role))]
    if not open_roles:
        return placing
    preset = "dynamic"
    if placing.vram_limit is not None and placing.device.type != "cpu":
        waiting = dict.fromkeys(open_roles, Waiting(is_open=True))
        for role in modules.keys() - waiting.keys():
            held = managed(modules[role])
            policy = placing.policy(role, configs.get(role)) if held is None else held.policy
            waiting[role] = Waiting.under(policy, placing.dtype)
        preset = _planned(pipe, placing, waiting)
    return placing.settled(dict.fromkeys(open_roles, preset), modules)


def _planned(pipe: Pipeline, placing: Placing, waiting: Mapping[str, Waiting]) -> str:
    call = placing.open_call
    try:
        plan = plan_call(pipe, call, device=placing.device, vram_limit=placing.vram_limit, waiting=waiting)
    except (NotEnoughMemory, Unplannable) as error:
        logger.warning("policy 'auto': weights are not rounded, as no plan was made for the call %s: %s", call, error)
        return "dynamic"
    lowered = len(plan.options) > 1 and plan.storage == plan.options[-1].storage
    preset = "fp8" if lowered else "dynamic"
    weighed = "; ".join(map(str, plan.options)) or "the device converts no float8"
    logger.info("policy 'auto' is %r with vram_limit=%s GiB: %s", preset, placing.vram_limit, weighed)
    return preset
