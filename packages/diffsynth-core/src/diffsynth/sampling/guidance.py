"""Guidance: the combination of velocities of several branches."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def classifier_free_guidance(
    velocity_cond: Float[Tensor, "b ..."], velocity_uncond: Float[Tensor, "b ..."], cfg_scale: float
) -> Float[Tensor, "b ..."]:
    """Return the guided velocity, a tensor `v_uncond + cfg_scale * (v_cond - v_uncond)`, in the shape and dtype of the
    inputs.

    Ho & Salimans 2022, arXiv:2207.12598. With 1.0 the result is `velocity_cond` up to rounding: skip the second pass
    then, as `Pipeline` does. 0 is `velocity_uncond`; values below 0 guide away from the prompt.

    Raises:
        ValueError: the two shapes differ.
    """
    if velocity_cond.shape != velocity_uncond.shape:
        raise ValueError(
            f"velocity_cond is {tuple(velocity_cond.shape)}, velocity_uncond is {tuple(velocity_uncond.shape)}; "
            f"expected one shape"
        )
    return velocity_uncond + cfg_scale * (velocity_cond - velocity_uncond)
