"""From a call's `step_cache` to the caches that serve it, or the reason why none can."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from diffsynth.errors import Refused
from diffsynth.runtime.acceleration.blocks import long_stacks
from diffsynth.runtime.acceleration.session import StepCacheSession
from diffsynth.runtime.acceleration.step_cache import StepCache
from diffsynth.runtime.acceleration.tea import model_named


def step_cache_session(
    cache: StepCache | None, components: Mapping[str, Any], loop_roles: Collection[str], model_name: str | None
) -> StepCacheSession:
    """The caches of one call, empty still.

    Args:
        cache: None caches nothing.
        components: role -> what is loaded.
        loop_roles: the networks that the loop calls.
        model_name: the pipeline's, None if it was put together from files.

    Raises:
        Refused: the model, or the form of its network, is not served; the message says why.
    """
    if cache is None:
        return StepCacheSession(None)
    model = None if model_name is None else model_named(model_name)
    if (reason := cache.refuses(model)) is not None:
        raise Refused(f"step_cache={cache!r} is refused: {reason}")
    loaded = {role: components[role] for role in loop_roles if isinstance(components.get(role), nn.Module)}
    networks = [stacks for stacks in map(long_stacks, loaded.values()) if sum(len(each.blocks) for each in stacks) > 1]
    if not networks:
        kinds = ", ".join(f"{role} ({type(module).__name__})" for role, module in loaded.items())
        raise Refused(
            f"step_cache={cache!r} is refused: {kinds or 'no network'} has no repeated blocks that could be left out; "
            "its architecture names them in repeated_blocks"
        )
    return StepCacheSession(cache, networks, model)
