"""Flow matching: the velocity of the straight path from data to noise (Lipman et al. 2023, arXiv:2210.02747)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffsynth.errors import TrainingError
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.unit import Unit
from diffsynth.spec import TrainingSpec, resolve


@dataclass(frozen=True, kw_only=True)
class FlowMatchOptions:
    """Options of the objective `flow_match` in a recipe.

    Args:
        table: number of levels in the schedule that indices are sampled from.
        min_index: start of the sampled range as a share of the table, in [0, 1); 0 is pure noise.
        max_index: end of the sampled range, in (0, 1]; 1 is data.
        shift: moves levels towards noise, `shift sigma / (1 + (shift - 1) sigma)`, in addition to the schedule's own
            shift; 1 changes nothing. Only near pure noise does the image depend on its caption alone, so more samples
            there train the text conditioning sooner.
        weighting: "none", or "bell", which gives the middle of the noise range more weight.
    """

    table: int = 1000
    min_index: float = 0.0
    max_index: float = 1.0
    shift: float = 1.0
    weighting: Literal["none", "bell"] = "none"


class FlowMatch:
    """Mean squared error between `pipe.velocity()` and `noise - x0`, at levels of the pipeline's own schedule."""

    Options: ClassVar[type] = FlowMatchOptions
    columns: ClassVar[frozenset[str]] = frozenset()
    needs_forward_only: ClassVar[bool] = True

    def __init__(self, options: FlowMatchOptions, pipe: Pipeline, spec: TrainingSpec) -> None:
        if not spec.schedule:
            raise TrainingError(f"{spec.pipeline} declares no schedule for training; flow_match needs one")
        if not 0 <= options.min_index < options.max_index <= 1:
            raise TrainingError(
                f"[objective] min_index = {options.min_index}, max_index = {options.max_index}: "
                f"expected 0 <= min_index < max_index <= 1"
            )
        self.pipe = pipe
        if not options.shift > 0:
            raise TrainingError(f"[objective] shift = {options.shift}: expected a positive number; 1 changes nothing")
        levels = resolve(spec.schedule)(options.table)[:-1].to(pipe.device)
        self.sigmas: Float[Tensor, "levels"] = options.shift * levels / (1 + (options.shift - 1) * levels)
        self.weights = bell_weights(self.sigmas) if options.weighting == "bell" else torch.ones_like(self.sigmas)
        self.first = int(options.min_index * options.table)
        self.last = max(int(options.max_index * options.table), self.first + 1)

    def units(self) -> tuple[Unit, ...]:
        """Return a tuple of the pipeline's `Unit`s that compute the network's conditions and the clean latents."""
        return self.pipe.condition_units("input_latents")

    def loss(self, values: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics): a scalar tensor with gradient, and a dict `noisy_half`, `clean_half` -> unweighted
        mean squared error of the velocity at the noisier or cleaner half of the levels, NaN if the batch has none
        there.
        """
        x0: Float[Tensor, "b ..."] = values["input_latents"]
        # Sample an index, not a time: rounded to bf16, times above 512 of 1000 lie on a grid of 4.
        index = torch.randint(self.first, self.last, (len(x0),), generator=generator, device=x0.device)
        sigma = self.sigmas[index]
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        level = sigma.view(-1, *[1] * (x0.ndim - 1))
        conditions = self.pipe.velocity_arguments(values)
        predicted = self.pipe.velocity((1 - level) * x0 + level * noise, sigma, **conditions)
        error = rearrange((predicted.float() - (noise - x0)).square(), "b ... -> b (...)").mean(dim=1)
        noisy = index < len(self.sigmas) // 2
        halves = {"noisy_half": error[noisy].mean(), "clean_half": error[~noisy].mean()}
        return (self.weights[index] * error).mean(), {name: half.detach() for name, half in halves.items()}

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Do nothing: this objective measures no value after training."""


def bell_weights(sigmas: Float[Tensor, "levels"]) -> Float[Tensor, "levels"]:
    """Return a tensor `levels` with the loss weight of each noise level in `sigmas`: mean 1, minimum 0, largest for the
    level nearest to 1/2.

    `exp(-2 (sigma - 1/2)^2)` minus its smallest value, as in DiffSynth-Studio.
    """
    bell = torch.exp(-2 * (sigmas - 0.5).square())
    bell = bell - bell.min()
    return bell * (len(bell) / bell.sum())
