"""The contract of an objective, and how a recipe's `[objective]` becomes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffsynth import _discovery
from diffsynth.errors import TrainingError, did_you_mean
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.unit import Unit
from diffsynth.spec import TrainingSpec, resolve
from diffsynth_train.config import Recipe, parse_section


class Objective(Protocol):
    """A loss over a pipeline. Built as `cls(options, pipe, spec)`; `Options` is a dataclass of the recipe's keys.

    Args (class attributes):
        Options: what may stand in `[objective]` besides `name`.
        columns: call arguments that it needs from the manifest, whatever units run.
        needs_forward_only: whether trained modules are only ever called as modules, which several processes need.
    """

    Options: ClassVar[type]
    columns: ClassVar[frozenset[str]]
    needs_forward_only: ClassVar[bool]

    def units(self) -> tuple[Unit, ...]:
        """The pipeline's units whose results it reads, in order."""
        ...

    def loss(self, values: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar with gradient, and further numbers for the log.

        Args:
            values: call arguments and what the units wrote, tensors on the pipeline's device.
            generator: on that device; all randomness comes from it.
        """
        ...

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Called once at the end, on the weights that ship, with all rows: what is measured rather than learned."""
        ...


def build_objective(recipe: Recipe, pipe: Pipeline, spec: TrainingSpec) -> Objective:
    """The objective that the recipe names.

    Raises:
        TrainingError: no name, an unknown name or option.
    """
    options = dict(recipe.objective)
    declared = {each.spec.name: each.spec for each in _discovery.catalog().objectives}
    name = options.pop("name", None)
    if name not in declared:
        raise TrainingError(
            f"[objective] name = {name!r}: expected one of {', '.join(declared)}{did_you_mean(str(name), declared)}"
        )
    cls: type[Any] = resolve(declared[name].objective)
    return cls(parse_section(cls.Options, options, where="objective"), pipe, spec)
