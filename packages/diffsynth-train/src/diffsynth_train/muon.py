"""Muon (Jordan et al. 2024): matrices follow the orthogonal factor of their momentum, everything else follows AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step: they bring singular values of (0, 1] near 1, not to 1, in five steps."""
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95
_ADAM_SCALE = 0.2
"""Root mean square of an entry of AdamW's update, about; Muon's is brought to it, so that rates mean the same."""


class Muon(torch.optim.Optimizer):
    """Muon for groups with `orthogonal`, AdamW for the others.

    An update is scaled by `0.2 sqrt(max(rows, columns))` (Liu et al. 2025, arXiv:2502.16982), so a learning rate and a
    weight decay for AdamW serve here, too. Convolutions count as matrices of `out x (in * height * width)`.

    Args:
        groups: parameter groups with `params`, `weight_decay` and `orthogonal`.
        lr: learning rate.
        betas: decay of AdamW's moments.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """See `torch.optim.Optimizer`."""
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
        # Nesterov's: the gradient once more, on top of the mean that already holds it.
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
    """About `U V^T` of the singular value decomposition `U S V^T`: singular values between 0.7 and 1.2, in fp32.

    Five Newton-Schulz steps in bf16, whose errors the next step's gradient forgives.
    """
    a, b, c = _QUINTIC
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        # As sums within the products: one rounding to bf16 each.
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)
