"""Conversions between what networks predict and the velocity `noise - x0` that the denoising loop integrates.

The state of the loop is `x = (1 - sigma) * x0 + sigma * noise`. Networks trained with betas see the same state in
variance-preserving (VP) scaling, in which the squares of both weights add up to 1. `docs/predictions.md` derives the
formulas; the noise levels and timesteps of such networks are in `schedule.BetaSchedule`.

Conversions compute in fp32, or in fp64 if an input has it. Pass latents in fp32, too: near the singular level of a
prediction, the rounding of bf16 latents grows to a large error of the velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.arguments import check_tensors


def velocity_from_epsilon(
    latents: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"], epsilon: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """Return the velocity of a network that predicts the noise, a tensor `(epsilon - latents) / (1 - sigma)` in the
    shape of `latents`.

    DDPM, Ho et al. 2020, arXiv:2006.11239. Singular at sigma = 1: latents are pure noise there, and the noise does not
    determine x0. The result is not finite then, and inaccurate near 1.

    Args:
        latents: latents at noise level `sigma`.
        sigma: noise level of each entry, fp32, in [0, 1). The range is not checked, because reading a tensor on an
            accelerator would synchronise with it.
        epsilon: the network's prediction of the noise.

    Raises:
        ValueError: shapes differ, or `sigma` has another length.
        TypeError: an argument that is no floating-point tensor.
    """
    level = _level(latents, sigma, epsilon=epsilon)
    return (epsilon - _widened(latents, sigma)) / (1 - level)


def velocity_from_x0(
    latents: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"], x0: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """Return the velocity of a network that predicts the data, a tensor `(latents - x0) / sigma` in the shape of
    `latents`.

    Singular at sigma = 0: latents are data there, and data do not determine the noise. A schedule ends in 0, so a
    solver must not evaluate the velocity at the last level.

    Args:
        latents: latents at noise level `sigma`.
        sigma: noise level of each entry, fp32, in (0, 1]; not checked, as in `velocity_from_epsilon`.
        x0: the network's prediction of the data.

    Raises:
        ValueError: shapes differ, or `sigma` has another length.
        TypeError: an argument that is no floating-point tensor.
    """
    level = _level(latents, sigma, x0=x0)
    return (_widened(latents, sigma) - x0) / level


def velocity_from_v(
    latents: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"], v: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """Return the velocity of a network with v-prediction, a tensor `((2 * sigma - 1) * latents + r * v) / r^2`,
    `r^2 = (1 - sigma)^2 + sigma^2`, in the shape of `latents`.

    Salimans & Ho 2022, arXiv:2202.00512: in VP scaling, `v = alpha * noise - beta * x0` with the weights
    `alpha = (1 - sigma) / r` and `beta = sigma / r` of the state `alpha * x0 + beta * noise`. It has no singular level.

    Args:
        latents: latents at noise level `sigma`, in the scaling of the loop, not in VP scaling.
        sigma: noise level of each entry, fp32, in [0, 1]; not checked, as in `velocity_from_epsilon`.
        v: the network's prediction.

    Raises:
        ValueError: shapes differ, or `sigma` has another length.
        TypeError: an argument that is no floating-point tensor.
    """
    level = _level(latents, sigma, v=v)
    square = _square(level)
    return ((2 * level - 1) * latents + square.sqrt() * v) / square


def variance_preserving(latents: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """Return the state in VP scaling, a tensor `latents / sqrt((1 - sigma)^2 + sigma^2)` in the shape and dtype of
    `latents`.

    Networks trained with betas take it: `latents` are `(1 - sigma) * x0 + sigma * noise`, and the result is
    `alpha * x0 + beta * noise` with `alpha^2 + beta^2 = 1` and the same ratio of the weights.

    Args:
        latents: latents at noise level `sigma`.
        sigma: noise level of each entry, fp32, in [0, 1].

    Raises:
        ValueError: `sigma` has another length than the batch.
        TypeError: an argument that is no floating-point tensor.
    """
    return (latents / _square(_level(latents, sigma)).sqrt()).to(latents.dtype)


def from_variance_preserving(latents: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """Return a state in VP scaling as the loop has it, a tensor `latents * sqrt((1 - sigma)^2 + sigma^2)` in the shape
    and dtype of `latents`; the inverse of `variance_preserving`.

    Sampling with a network trained with betas starts at standard normal noise in VP scaling.

    Args:
        latents: a state in VP scaling at noise level `sigma`.
        sigma: noise level of each entry, fp32, in [0, 1].

    Raises:
        ValueError: `sigma` has another length than the batch.
        TypeError: an argument that is no floating-point tensor.
    """
    return (latents * _square(_level(latents, sigma)).sqrt()).to(latents.dtype)


@dataclass(frozen=True)
class Prediction:
    """A kind of network output, and the scaling in which such a network takes latents.

    Args:
        name: the key in `PREDICTIONS`.
        scale_input: function `(latents, sigma) -> latents` for the input of the network.
        to_velocity: function `(latents, sigma, output) -> velocity`; `latents` are those of the loop, not the scaled
            ones.
    """

    name: str
    scale_input: Callable[[Tensor, Tensor], Tensor]
    to_velocity: Callable[[Tensor, Tensor, Tensor], Tensor]


def _unscaled(latents: Tensor, sigma: Tensor) -> Tensor:
    return latents


def _output(latents: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
    return output


PREDICTIONS: Mapping[str, Prediction] = MappingProxyType(
    {
        each.name: each
        for each in (
            Prediction("velocity", _unscaled, _output),
            Prediction("epsilon", variance_preserving, velocity_from_epsilon),
            Prediction("x0", _unscaled, velocity_from_x0),
            Prediction("v", variance_preserving, velocity_from_v),
        )
    }
)
"""Name of what a network predicts -> its `Prediction`."""


def _level(latents: Tensor, sigma: Tensor, **outputs: Tensor) -> Tensor:
    """Return `sigma` with as many axes as `latents`, after a check of all types and shapes."""
    check_tensors(latents=latents, sigma=sigma, **outputs)
    for name, output in outputs.items():
        if output.shape != latents.shape:
            raise ValueError(f"{name} is {tuple(output.shape)}, latents are {tuple(latents.shape)}; expected one shape")
    if not latents.ndim:
        raise ValueError("latents is (), a scalar; expected a batch, (b, ...)")
    if sigma.shape != latents.shape[:1]:
        raise ValueError(f"sigma is {tuple(sigma.shape)}; expected ({len(latents)},), one level per entry of latents")
    return sigma.view(-1, *[1] * (latents.ndim - 1))


def _widened(latents: Tensor, sigma: Tensor) -> Tensor:
    """Return `latents` in the wider of their dtype and that of `sigma`, so that no difference is rounded to bf16."""
    return latents.to(torch.promote_types(latents.dtype, sigma.dtype))


def _square(level: Tensor) -> Tensor:
    return (1 - level).square() + level.square()
