"""Reproducible random noise, and the mixing of noise with data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.arguments import check_integer, check_number, check_tensors
from diffsynth.core.device import check_floating
from diffsynth.errors import shown


def initial_noise(
    shape: Sequence[int],
    seeds: Sequence[int | None],
    *,
    rand_device: torch.device | str = "cpu",
    dtype: torch.dtype,
    device: torch.device | str,
) -> Float[Tensor, "b ..."]:
    """Return a tensor `(len(seeds), *shape)` of standard normal noise; entry i depends on `seeds[i]` only.

    Random numbers are generated in `dtype`, because a generator can give other values in bf16 than in fp32. Z-Image,
    FLUX.2 and Qwen-Image use the pipeline's dtype (bf16); FLUX.1 and Wan use fp32, and their callers cast afterwards.

    Args:
        shape: shape of one entry, `(c, h, w)` or `(c, t, h, w)`.
        seeds: one per entry; None uses the global generator of `rand_device`.
        rand_device: device of the generator. The CPU gives the same noise on every machine.
        dtype: dtype of the random numbers and of the result.
        device: device of the result.

    Raises:
        ValueError: no seeds, a seed that is no integer of 64 bits, or an extent that is no integer of at least 0.
        TypeError: `seeds` is one seed and no list, or `dtype` is not floating-point.
    """
    check_floating(dtype, "dtype")
    for name, values in {"shape": shape, "seeds": seeds}.items():
        if isinstance(values, str | bytes) or not isinstance(values, Sequence):
            raise TypeError(f"{name}={shown(values)}: expected a list of integers")
    for extent in shape:
        check_integer("an extent of shape", extent, least=0)
    if not seeds:
        raise ValueError("seeds is empty; expected one entry per image, None for a random seed")
    images = [
        torch.randn(1, *shape, generator=_generator(seed, rand_device), device=rand_device, dtype=dtype)
        for seed in seeds
    ]
    return torch.cat(images).to(device)


def add_noise(
    x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"] | Float[Tensor, ""] | float
) -> Float[Tensor, "b ..."]:
    """Return noised data, the tensor `(1 - sigma) * x0 + sigma * noise`, in the shape and dtype of `x0`.

    Args:
        x0: data.
        noise: noise of the shape of `x0`.
        sigma: noise level in [0, 1], one for all or one per entry. The range is not checked, because reading a tensor
            on an accelerator would synchronise with it.

    Raises:
        ValueError: `noise` has another shape than `x0`, or `sigma` another length; or a number `sigma` is not finite.
        TypeError: `x0` or `noise` is no floating-point tensor.
    """
    check_tensors(x0=x0, noise=noise)
    if not isinstance(sigma, Tensor):
        check_number("sigma", sigma)
    if noise.shape != x0.shape:
        raise ValueError(f"noise is {tuple(noise.shape)}, x0 is {tuple(x0.shape)}; expected one shape")
    if isinstance(sigma, Tensor) and sigma.ndim:
        if sigma.shape != x0.shape[:1]:
            raise ValueError(f"sigma is {tuple(sigma.shape)}; expected a number or ({len(x0)},), one per entry of x0")
        sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
    return ((1 - sigma) * x0 + sigma * noise).to(x0.dtype)


def _generator(seed: int | None, device: torch.device | str) -> torch.Generator | None:
    if seed is None:
        # A new Generator has a constant seed; only the global generator differs between runs.
        return None
    check_integer("seed", seed, least=-(2**63), most=2**64 - 1)
    return torch.Generator(device).manual_seed(int(seed))
