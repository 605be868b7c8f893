"""The branches of classifier-free guidance: computed one by one, in processes of their own, or as one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from diffsynth.core.parallel import MeshAxis, compute_and_gather
from diffsynth.runtime.unit import Program, can_run, is_enabled, is_per_branch

MERGES = "merges_branches"
"""The name that a unit writes to have the branches computed as one batch: True or False."""

Predict = Callable[[str, Tensor, Tensor, Mapping[str, Any]], Tensor]
"""Function of a branch's name, latents, noise levels and conditions that returns the velocity."""


class Branches:
    """The conditions of each branch of a call, and their evaluation.

    Args:
        conditions: branch -> name -> value.
        merges: whether the branches are computed as one batch, in this order; see `merge_conditions`.
        batch_size: of one branch.
        axis: the mesh axis whose processes compute one branch each, unless branches are merged.
    """

    def __init__(
        self, conditions: Mapping[str, Mapping[str, Any]], *, merges: bool, batch_size: int, axis: MeshAxis
    ) -> None:
        self._conditions = conditions
        self._axis = axis
        self._merged = merge_conditions(conditions, batch_size) if merges and len(conditions) > 1 else None

    def predict(self, predict: Predict, latents: Tensor, levels: Tensor) -> list[Tensor]:
        """Return a list of velocities, a tensor for each branch of guidance, computed one by one or as one batch."""
        if self._merged is None:
            return compute_and_gather(
                list(self._conditions),
                lambda branch: predict(branch, latents, levels, self._conditions[branch]),
                self._axis,
            )
        count, name = len(self._conditions), "+".join(self._conditions)
        together = predict(name, torch.cat([latents] * count), levels.repeat(count), self._merged)
        return list(together.chunk(count))


def merge_conditions(conditions: Mapping[str, Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Return a dict name -> condition for one batch of all branches of guidance: tensors that differ, or have an entry
    for each of several results, are concatenated, the rest is passed once.

    Tensors that differ are concatenated along their first axis. A condition that all branches share is passed as it is,
    but a tensor with an entry for each of several results is repeated.

    Args:
        conditions: branch -> name -> value.
        batch_size: of one branch.

    Raises:
        ValueError: a condition that differs is no tensor.
    """
    branches = list(conditions.values())
    merged = {}
    for name, first in branches[0].items():
        values = [branch[name] for branch in branches]
        if all(value is first for value in values):
            repeats = isinstance(first, Tensor) and first.ndim > 0 and first.shape[0] == batch_size > 1
            merged[name] = torch.cat(values) if repeats else first
        elif all(isinstance(value, Tensor) for value in values):
            merged[name] = torch.cat([value.expand(batch_size, *value.shape[1:]) for value in values])
        elif all(value == first for value in values):
            merged[name] = first
        else:
            raise ValueError(f"{name} differs between the branches of guidance and cannot be merged into one batch")
    return merged


def check_merging(
    program: Program,
    components: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    tensors: Collection[str],
    conditions: Collection[str],
    axis: MeshAxis,
) -> None:
    """Raise ValueError unless the guidance branches (cond, uncond) can share one batch, before anything is encoded.

    Args:
        program: the pipeline's units.
        components: role -> component or None.
        values: arguments of the call.
        tensors: names of the conditions that `merge_conditions` can concatenate.
        conditions: names of all conditions.
        axis: the mesh axis whose processes compute one branch each.

    Raises:
        ValueError: a unit in use writes a condition for each branch that is no tensor; or each branch has a process of
            its own.
    """
    if axis.size > 1:
        raise ValueError(
            f"cfg_merge=True and pipe.parallel(cfg={axis.size}), which gives each branch a process; leave out one"
        )
    branched: set[str] = set()
    for step in program.units:
        runs = can_run(step, components) and is_enabled(step, values)
        if not runs or not is_per_branch(step, branched):
            continue
        branched |= set(step.writes)
        separate = sorted(set(step.writes) & (set(conditions) - set(tensors)))
        if separate and program.is_used(step, values):
            raise ValueError(
                f"cfg_merge=True: {step.title} gives each branch of guidance its own {' and '.join(separate)}, which "
                "cannot be put into one batch; leave out cfg_merge, or turn guidance off with cfg_scale=1"
            )
