"""Solvers of the ODE `dx/dsigma = velocity(x, sigma)` from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`(latents, sigma) -> noise - x0`; sigma is a 0-dim fp32 tensor."""


def euler(
    velocity: Velocity,
    latents: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, "steps_plus_1"],
    on_step: Callable[[int, Tensor], None] | None = None,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at noise level `sigmas[-1]`, in shape and dtype of `latents`, which are at
    `sigmas[0]`, by one Euler step per pair of neighbouring levels.

    Rectified flow, arXiv:2209.03003. Latents keep their dtype between steps, also bf16, as in the published pipelines.

    Args:
        velocity: `(latents, sigma) -> noise - x0`, of the shape of `latents`.
        latents: latents at noise level `sigmas[0]`.
        sigmas: noise levels, fp32, strictly descending; see `diffsynth.sampling.schedule`.
        on_step: called after each step with its index and the new latents.
        progress: wraps the list of steps, as `tqdm` does.

    Raises:
        ValueError: `sigmas` has fewer than two levels.
    """
    if len(sigmas) < 2:
        raise ValueError(f"sigmas has {len(sigmas)} entries; expected num_steps + 1, at least 2")
    for index, (sigma, sigma_next) in enumerate(progress(list(pairwise(sigmas)))):
        latents = (latents + velocity(latents, sigma) * (sigma_next - sigma)).to(latents.dtype)
        if on_step is not None:
            on_step(index, latents)
    return latents
