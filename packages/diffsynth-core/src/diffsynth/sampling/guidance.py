"""Guidance: the combination of velocities of several branches.

All functions take and return velocities, `noise - x0`. They hold no state; what a call keeps between steps is an
argument and a result. The settings of a call's argument `guidance` are in `diffsynth.runtime.guidance`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.arguments import check_integer, check_number, check_tensors


def classifier_free_guidance(
    velocity_cond: Float[Tensor, "b ..."], velocity_uncond: Float[Tensor, "b ..."], cfg_scale: float
) -> Float[Tensor, "b ..."]:
    """Return the guided velocity, a tensor `v_uncond + cfg_scale * (v_cond - v_uncond)`, in the shape and dtype of the
    inputs.

    Ho & Salimans 2022, arXiv:2207.12598. With 1.0 the result is `velocity_cond` up to rounding: skip the second pass
    then, as `Pipeline` does. 0 is `velocity_uncond`; values below 0 guide away from the prompt.

    Raises:
        ValueError: the two shapes differ, or `cfg_scale` is no finite number.
        TypeError: a velocity that is no floating-point tensor.
    """
    _check(velocity_cond, cfg_scale, velocity_uncond=velocity_uncond)
    return velocity_uncond + cfg_scale * (velocity_cond - velocity_uncond)


def rescaled_guidance(
    velocity_cond: Float[Tensor, "b ..."],
    velocity_uncond: Float[Tensor, "b ..."],
    cfg_scale: float,
    *,
    guidance_rescale: float = 0.7,
) -> Float[Tensor, "b ..."]:
    """Return the velocity of classifier-free guidance, a tensor, scaled toward the standard deviation of
    `velocity_cond`, in the shape and dtype of the inputs.

    Lin et al. 2023, arXiv:2305.08891, section 3.4: `v = phi * v_cfg * std(v_cond) / std(v_cfg) + (1 - phi) * v_cfg`,
    where `std` is taken over all axes of an entry. Large scales make the guided velocity too large, and the image
    overexposed. The paper rescales the output of its network, in VP scaling; here it is the velocity.

    Args:
        velocity_cond: velocity of the prompt.
        velocity_uncond: velocity without it, or of a negative prompt.
        cfg_scale: as for `classifier_free_guidance`.
        guidance_rescale: phi, in [0, 1]; 0 is classifier-free guidance, 1 gives exactly the standard deviation of
            `velocity_cond`. The paper uses 0.7.

    Raises:
        ValueError: the two shapes differ, or a number is out of range.
        TypeError: a velocity that is no floating-point tensor.
    """
    check_number("guidance_rescale", guidance_rescale, least=0, most=1, note="0 rescales nothing")
    guided = classifier_free_guidance(velocity_cond, velocity_uncond, cfg_scale)
    axes = _axes(guided)
    smallest = torch.finfo(guided.dtype).tiny  # a network whose last layer is zero predicts 0 everywhere
    deviation = guided.std(dim=axes, correction=0, keepdim=True).clamp_min(smallest)
    ratio = velocity_cond.std(dim=axes, correction=0, keepdim=True) / deviation
    return guided * (guidance_rescale * ratio + (1 - guidance_rescale))


def adaptive_projected_guidance(
    velocity_cond: Float[Tensor, "b ..."],
    velocity_uncond: Float[Tensor, "b ..."],
    cfg_scale: float,
    *,
    latents: Float[Tensor, "b ..."],
    sigma: Float[Tensor, " b"],
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
    average: Float[Tensor, "b ..."] | None = None,
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """Return (the guided velocity, the running average for the next step), two tensors in the shape of `latents`, in
    fp32 or the wider dtype of an input.

    APG, Sadat et al. 2024, arXiv:2410.02416. As in the paper, it acts on the denoised predictions
    `x0 = latents - sigma * velocity`, not on velocities: with `d = x0_cond - x0_uncond` it

    1. adds the past, `d + momentum * average`; this sum is the second result;
    2. scales each entry down to the L2 norm `norm_threshold`, if its norm is larger;
    3. splits it into parts parallel and orthogonal to `x0_cond`, and multiplies the parallel one, which oversaturates,
       by `eta`;
    4. adds `cfg_scale - 1` times the result to `x0_cond`, and converts the sum back to a velocity.

    With `eta` 1, no threshold and no momentum it is `classifier_free_guidance` up to rounding. Norms and projections
    are taken over all axes of an entry. The guider of diffusers applies the same steps to the output of a network as it
    is, for flow matching to velocities, whose parallel part is another one; on x0 predictions, with
    `use_original_formulation=True` and a scale of `cfg_scale - 1`, it gives these values.

    Args:
        velocity_cond: velocity of the prompt.
        velocity_uncond: velocity without it, or of a negative prompt.
        cfg_scale: as for `classifier_free_guidance`.
        latents: latents at noise level `sigma`, for which the velocities were predicted.
        sigma: noise level of each entry, fp32, in (0, 1]. At 0, x0 does not depend on the velocity, and the result is
            not finite; the range is not checked, because reading a tensor on an accelerator would synchronise with it.
        eta: weight of the parallel part; 0, the paper's choice, removes it, and 1 keeps it.
        norm_threshold: largest L2 norm of an entry's difference; 0 is no limit. The norm grows with the square root of
            the number of latent values, so a good value depends on the size of the image.
        momentum: weight of `average`; the paper uses -0.75 to -0.5, away from the past direction.
        average: second result of the previous step; None in the first step.

    Raises:
        ValueError: shapes differ, or a number is not finite or out of range.
        TypeError: an argument that should be a floating-point tensor and is none.
    """
    check_number("norm_threshold", norm_threshold, least=0, note="0 is no limit")
    check_number("eta", eta)
    check_number("momentum", momentum)
    check_tensors(latents=latents, sigma=sigma)
    _check(velocity_cond, cfg_scale, velocity_uncond=velocity_uncond, latents=latents, average=average)
    if sigma.shape != latents.shape[:1]:
        raise ValueError(f"sigma is {tuple(sigma.shape)}; expected ({len(latents)},), one level per entry of latents")
    level, axes = sigma.view(-1, *[1] * (latents.ndim - 1)), _axes(latents)
    x0_cond = latents - level * velocity_cond
    update = level * (velocity_uncond - velocity_cond)
    if average is not None:
        update = update + momentum * average
    average = update
    if norm_threshold > 0:
        norm = torch.linalg.vector_norm(update, dim=axes, keepdim=True)
        update = update * (norm_threshold / norm).clamp(max=1)
    smallest = torch.finfo(x0_cond.dtype).tiny
    direction = x0_cond / torch.linalg.vector_norm(x0_cond, dim=axes, keepdim=True).clamp_min(smallest)
    parallel = (update * direction).sum(dim=axes, keepdim=True) * direction
    update = update - (1 - eta) * parallel
    return velocity_cond - (cfg_scale - 1) / level * update, average


def cfg_zero_star(
    velocity_cond: Float[Tensor, "b ..."],
    velocity_uncond: Float[Tensor, "b ..."],
    cfg_scale: float,
    *,
    index: int,
    zero_steps: int = 1,
) -> Float[Tensor, "b ..."]:
    """Return the guided velocity, a tensor `s * v_uncond + cfg_scale * (v_cond - s * v_uncond)`, or zeros in the first
    `zero_steps` steps, in the shape and dtype of the inputs.

    CFG-Zero*, Fan et al. 2025, arXiv:2503.18886, for flow matching. `s = <v_cond, v_uncond> / |v_uncond|^2`, one number
    for each entry, makes `s * v_uncond` the nearest multiple of `v_uncond` to `v_cond`. Zeros leave the latents as they
    are: near pure noise, an inaccurate velocity can be worse than none.

    Args:
        velocity_cond: velocity of the prompt.
        velocity_uncond: velocity without it, or of a negative prompt.
        cfg_scale: as for `classifier_free_guidance`.
        index: of the step, from 0.
        zero_steps: number of steps at the beginning with a velocity of 0, at least 0; the paper zeroes about 4 % of the
            steps.

    Raises:
        ValueError: the two shapes differ, or a number is no integer of at least 0, `cfg_scale` aside.
        TypeError: a velocity that is no floating-point tensor.
    """
    check_integer("zero_steps", zero_steps, least=0)
    check_integer("index", index, least=0)
    _check(velocity_cond, cfg_scale, velocity_uncond=velocity_uncond)
    if index < zero_steps:
        return torch.zeros_like(velocity_cond)
    axes = _axes(velocity_cond)
    product = (velocity_cond * velocity_uncond).sum(dim=axes, keepdim=True)
    square = velocity_uncond.square().sum(dim=axes, keepdim=True)
    scale = product / square.clamp_min(torch.finfo(square.dtype).tiny)
    return classifier_free_guidance(velocity_cond, scale * velocity_uncond, cfg_scale)


def _axes(tensor: Tensor) -> tuple[int, ...]:
    """Return all axes of a tensor but the first, which counts the entries of a batch."""
    return tuple(range(1, tensor.ndim))


def _check(velocity_cond: Tensor, cfg_scale: float, **others: Tensor | None) -> None:
    check_number("cfg_scale", cfg_scale)
    check_tensors(velocity_cond=velocity_cond, **{name: each for name, each in others.items() if name != "average"})
    if others.get("average") is not None:
        check_tensors(average=others["average"])
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != velocity_cond.shape:
            raise ValueError(
                f"velocity_cond is {tuple(velocity_cond.shape)}, {name} is {tuple(tensor.shape)}; expected one shape"
            )
