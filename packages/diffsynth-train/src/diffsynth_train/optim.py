"""Optimizers, the learning rate over a run, and which parameters get which treatment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth_train.config import OptimizerRecipe

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on groups marked `orthogonal`, AdamW on the others.

    Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982) replaces the momentum of a matrix by the nearest
    orthogonal one; scaled by `0.2 sqrt(max(rows, columns))` its updates are as large as AdamW's, so that one learning
    rate serves both. Convolutions are matrices of their output channels.

    Args:
        groups: parameter groups with `lr`, `weight_decay`, `betas` and `orthogonal`.
        eps: of AdamW's denominator.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, eps: float = 1e-8) -> None:
        super().__init__(
            groups, {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99), "orthogonal": False, "eps": eps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["orthogonal"]:
                self._muon(parameters, group)
            else:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        momentum = group["betas"][0]
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(state["momentum"], momentum).flatten(1)  # Nesterov
            by_shape.setdefault(tuple(update.shape), []).append((parameter, update))
        for shape, members in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in members]))
            scale = 0.2 * math.sqrt(max(shape))
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
            state["step"] += 1
            state["mean"].lerp_(parameter.grad, 1 - group["betas"][0])
            state["square"].lerp_(parameter.grad.square(), 1 - group["betas"][1])
            first, second = (1 - beta ** state["step"] for beta in group["betas"])
            denominator = (state["square"] / second).sqrt_().add_(group["eps"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(state["mean"], denominator, value=-group["lr"] / first)


def orthogonalize(matrices: Float[Tensor, "n rows columns"], *, steps: int = 5) -> Float[Tensor, "n rows columns"]:
    """About `U V^T` of each matrix's singular value decomposition, by the quintic Newton-Schulz iteration.

    Singular values end between 0.7 and 1.2, which is near enough. On CUDA it runs in bf16; the result is fp32.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def build_optimizer(recipe: OptimizerRecipe, parameters: Iterable[tuple[str, nn.Parameter]]) -> MuonAdamW:
    """An optimizer over named parameters: decay on matrices alone, Muon on hidden matrices if the recipe wants it.

    Embeddings stay with AdamW: their rows are independent of each other.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters:
        matrix = parameter.ndim > 1 and min(parameter.shape[:2]) > 1
        orthogonal = matrix and recipe.name == "muon" and "embed_tokens" not in name
        group = groups.setdefault(
            "muon" if orthogonal else "matrix" if matrix else "vector",
            {
                "params": [],
                "lr": recipe.learning_rate,
                "betas": recipe.betas,
                "weight_decay": recipe.weight_decay if matrix else 0.0,
                "orthogonal": orthogonal,
            },
        )
        group["params"].append(parameter)
    return MuonAdamW(groups.values())


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
