"""Optimizer construction and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from diffsynth_train.config import OptimizerRecipe
from diffsynth_train.muon import Muon


def build_optimizer(
    recipe: OptimizerRecipe, parameters: Iterable[nn.Parameter], tables: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return a `torch.optim.Optimizer` of `parameters`: `Muon` if the recipe names it, else `AdamW` (Loshchilov &
    Hutter 2019, arXiv:1711.05101).

    Args:
        recipe: optimizer settings; weight decay is applied to matrices and convolutions only.
        parameters: the trained parameters.
        tables: those of them that are embedding tables, which Muon updates by AdamW.
    """
    table_ids = {id(table) for table in tables}
    matrices, rows, vectors = [], [], []
    for parameter in parameters:
        if parameter.ndim < 2 or min(parameter.shape[:2]) == 1:
            vectors.append(parameter)
        else:
            (rows if id(parameter) in table_ids else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay, "orthogonal": True},
        {"params": rows, "weight_decay": recipe.weight_decay, "orthogonal": False},
        {"params": vectors, "weight_decay": 0.0, "orthogonal": False},
    ]
    optimizer = Muon if recipe.name == "muon" else torch.optim.AdamW
    return optimizer([group for group in groups if group["params"]], lr=recipe.learning_rate, betas=recipe.betas)


def learning_rate(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Return the learning rate, a float, of step `step` (counted from 0) of `steps`, by the recipe's warm-up and
    schedule.
    """
    warmup = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    decay = 1.0
    if recipe.schedule == "cosine":
        span = max(steps - recipe.warmup_steps, 1)
        decay = 0.5 * (1 + math.cos(math.pi * min(max(step - recipe.warmup_steps, 0) / span, 1.0)))
    elif recipe.schedule == "trapezoid" and recipe.decay_steps:
        decay = min(1.0, (steps - step) / recipe.decay_steps)
    return recipe.learning_rate * warmup * decay
