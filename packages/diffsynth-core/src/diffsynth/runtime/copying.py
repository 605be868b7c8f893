"""Copies of pipelines: `copy.copy` shares the components, `copy.deepcopy` and `pickle` copy them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from diffsynth.core.vram.managed import managed

_MADE = frozenset(
    (
        *(
            "device",
            "dtype",
            "vram_limit",
            "size_limits",
            "mesh",
            "model_name",
            "component_files",
            "features",
            "roles",
            "facts",
            "per_image",
        ),
        *("program", "condition_rules", "_velocity_parameters", "_all_loop_roles", "components", "__signature__"),
        *("_offloader", "plan_cache", "_argument_types", "running_calls", "model_defaults"),
    )
)
"""The attributes that a new pipeline makes itself; others, such as loaded LoRAs, are copied."""


class CopyMethods:
    """The methods of `Pipeline` that copy it. A copy is built anew from the components."""

    def __copy__(self) -> Any:
        """Return a pipeline with the same components, which are not copied."""
        return _rebuilt(type(self), _state(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a pipeline with copies of the components.

        Raises:
            TypeError: a component is under a memory policy, or the pipeline computes together with other processes.
        """
        _refuse(self, "copied with its weights")
        state = _state(self)
        for name in ("components", "others"):
            state[name] = copy.deepcopy(state[name], memo)
        return _rebuilt(type(self), state)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what `pickle` stores: the components, and how a pipeline is built of them.

        Raises:
            TypeError: as for `copy.deepcopy`.
        """
        _refuse(self, "pickled")
        return _rebuilt, (type(self), _state(self))


def _state(pipe: Any) -> dict[str, Any]:
    return {
        "components": dict(pipe.components),
        "device": str(pipe.device),
        "torch_dtype": pipe.dtype,
        "component_files": pipe.component_files,
        "model_name": pipe.model_name,
        "defaults": dict(pipe.model_defaults),
        "others": {name: copy.copy(value) for name, value in vars(pipe).items() if name not in _MADE},
    }


def _rebuilt(cls: Any, state: Mapping[str, Any]) -> Any:
    built = {name: state[name] for name in ("device", "torch_dtype", "component_files")}
    pipe = cls(state["components"], **built)
    if state["model_name"] is not None:
        pipe.named(state["model_name"], state["defaults"])
    vars(pipe).update(state["others"])
    pipe.follow_defaults()  # those of loaded LoRAs
    return pipe


def _refuse(pipe: Any, how: str) -> None:
    """Raise TypeError for a pipeline whose components another object moves or shares."""
    wrapped = [role for role, part in pipe.parts.items() if isinstance(part, nn.Module) and managed(part) is not None]
    name = type(pipe).__name__
    if wrapped:
        raise TypeError(
            f"this {name} cannot be {how}: {', '.join(wrapped)} is under a memory policy, and a copy would move the "
            f"same weights. Load the model again, or share the components: {name}.from_components(**pipe.components)"
        )
    if pipe.mesh.branches.size * pipe.mesh.tokens.size > 1:
        raise TypeError(
            f"this {name} cannot be {how}: it computes together with other processes; copy it before parallel()"
        )
