"""The contract of an objective, and its construction from the `[objective]` section of a recipe."""

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
        Options: dataclass of the keys allowed in `[objective]` besides `name`.
        columns: call arguments that it needs from the manifest even if no unit reads them.
        needs_forward_only: whether it calls trained modules by forward() only, which multi-process training requires.
    """

    Options: ClassVar[type]
    columns: ClassVar[frozenset[str]]
    needs_forward_only: ClassVar[bool]

    def units(self) -> tuple[Unit, ...]:
        """Return a tuple of the `Unit`s of the pipeline whose results the loss needs, in the order they run."""
        ...

    def loss(self, values: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics): a scalar tensor with gradient, and a dict name -> scalar tensor of further metrics
        for the log.

        Args:
            values: call arguments and results of the units; tensors are on the pipeline's device.
            generator: the only source of randomness, on the pipeline's device.
        """
        ...

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measure values on all rows with the final weights and store them, for example in a config; called after
        training.
        """
        ...


def build_objective(recipe: Recipe, pipe: Pipeline, spec: TrainingSpec) -> Objective:
    """Return the `Objective` (training loss) that the recipe names, built with the recipe's options for `pipe`.

    Raises:
        TrainingError: the name is missing or unknown, or an option is unknown.
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
