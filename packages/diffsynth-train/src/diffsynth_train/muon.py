"""Muon (Jordan et al. 2024): matrices are updated by their orthogonalised momentum, all else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step: five steps bring singular values in (0, 1] near 1, not exactly to 1."""
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95
_ADAM_SCALE = 0.2
"""Approximate RMS of AdamW's update. Muon's update is scaled to it, so that learning rates are comparable."""


class Muon(torch.optim.Optimizer):
    """Optimizer that applies Muon to parameter groups with `orthogonal=True` and AdamW to the others.

    An update is scaled by `0.2 sqrt(max(rows, columns))` (Liu et al. 2025, arXiv:2502.16982), so learning rate and
    weight decay of AdamW can be used unchanged. Convolutions are treated as matrices `out x (in * height * width)`.

    Args:
        groups: parameter groups with `params`, `weight_decay` and `orthogonal`.
        lr: learning rate.
        betas: decay rates of AdamW's moments.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, once; return the loss that `closure` computes before, or None
        without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._orthogonal if group["orthogonal"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = update(parameter, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        return loss

    def _orthogonal(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        # Nesterov momentum: the gradient is added once more to the mean that includes it.
        ahead = parameter.grad.lerp(momentum, _MOMENTUM)
        direction = orthogonal_factor(ahead.flatten(1))
        return direction.mul_(_ADAM_SCALE * math.sqrt(max(direction.shape))).view_as(parameter)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        first, second = group["betas"]
        state["step"] += 1
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        square = state["square"] / (1 - second ** state["step"])
        return mean.div_(square.sqrt_().add_(group["eps"]))


def orthogonal_factor(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Return a matrix of the shape and dtype of `matrix`, close to `U V^T` of its singular value decomposition `U S
    V^T`.

    Five Newton-Schulz steps in bf16. Singular values of the result lie between 0.7 and 1.2; the result has the dtype of
    the input.
    """
    a, b, c = _QUINTIC
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        # addmm adds within the product, so each result is rounded to bf16 once.
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)
