"""The optimizer, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from diffsynth_train.config import OptimizerRecipe


def build_optimizer(recipe: OptimizerRecipe, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over named parameters; only matrices decay."""
    matrices, vectors = [], []
    for _, parameter in parameters:
        (matrices if parameter.ndim > 1 and min(parameter.shape[:2]) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=recipe.learning_rate, betas=recipe.betas
    )


def learning_rate(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """The rate of a step, 0 being the first of `steps`."""
    rising = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    falling = 1.0
    if recipe.schedule == "cosine":
        span = max(steps - recipe.warmup_steps, 1)
        falling = 0.5 * (1 + math.cos(math.pi * min(max(step - recipe.warmup_steps, 0) / span, 1.0)))
    elif recipe.schedule == "trapezoid" and recipe.decay_steps:
        falling = min(1.0, (steps - step) / recipe.decay_steps)
    return recipe.learning_rate * rising * falling
