"""The branches of classifier-free guidance: computed one by one, in processes of their own, or as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffsynth.core.parallel import MeshAxis, compute_and_gather
from diffsynth.runtime.feature import Condition
from diffsynth.runtime.unit import Program, is_per_branch, runs

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

    def predict(self, predict: Predict, latents: Tensor, levels: Tensor) -> dict[str, Tensor]:
        """Return a dict branch -> velocity, a tensor for each branch of guidance, computed one by one or together."""
        names = list(self._conditions)
        if self._merged is None:
            predictions = compute_and_gather(
                names, lambda branch: predict(branch, latents, levels, self._conditions[branch]), self._axis
            )
        else:
            together = torch.cat([latents] * len(names))
            merged = predict("+".join(names), together, levels.repeat(len(names)), self._merged)
            predictions = list(merged.chunk(len(names)))
        return dict(zip(names, predictions, strict=True))


def merge_conditions(conditions: Mapping[str, Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Return a dict name -> condition for one batch of all branches of guidance: tensors that differ, or have an entry
    for each of several results, are concatenated, the rest is passed once.

    Tensors that differ are concatenated along their first axis. A condition that all branches share is passed as it is,
    but a tensor with an entry for each of several results is repeated.

    Args:
        conditions: branch -> name -> value.
        batch_size: of one branch.

    Raises:
        ValueError: a condition that differs is no tensor, or has another shape in another branch.
    """
    branches = list(conditions.values())
    merged = {}
    for name, first in branches[0].items():
        values = [branch[name] for branch in branches]
        if all(value is first for value in values):
            repeats = isinstance(first, Tensor) and first.ndim > 0 and first.shape[0] == batch_size > 1
            merged[name] = torch.cat(values) if repeats else first
        elif all(isinstance(value, Tensor) for value in values):
            if len({tuple(value.shape[1:]) for value in values}) > 1:
                shapes = {branch: tuple(value.shape) for branch, value in zip(conditions, values, strict=True)}
                raise ValueError(
                    f"{name} differs in shape between the branches of guidance and cannot be merged into one batch: "
                    f"{shapes}"
                )
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
    rules: Mapping[str, Condition],
    axis: MeshAxis,
    argument: str,
) -> None:
    """Raise ValueError unless the branches of guidance can share one batch, before anything is encoded.

    Args:
        program: the pipeline's units.
        components: role -> component or None.
        values: arguments of the call.
        rules: name -> `Condition` of all conditions.
        axis: the mesh axis whose processes compute one branch each.
        argument: the name of the call's argument that asks for one batch, for messages.

    Raises:
        ValueError: a unit in use writes a condition for each branch that is no tensor; or each branch has a process of
            its own.
    """
    if axis.size > 1:
        raise ValueError(
            f"{argument}=True and pipe.parallel(cfg={axis.size}), which gives each branch a process; leave out one"
        )
    branched: set[str] = set()
    for step in program.units:
        if not runs(step, components, values) or not is_per_branch(step, branched):
            continue
        branched |= set(step.writes)
        separate = sorted(name for name in step.writes if name in rules and rules[name].batch == "separate")
        if separate and program.is_used(step, values):
            raise ValueError(
                f"{argument}=True: {step.title} gives each branch of guidance its own {' and '.join(separate)}, which "
                f"cannot be put into one batch; leave out {argument}, or turn guidance off with cfg_scale=1"
            )
