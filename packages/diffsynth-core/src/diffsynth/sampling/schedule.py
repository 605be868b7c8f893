"""Schedules of noise levels of every family, as pure functions, and those of networks trained with betas.

One convention: sigma is 1 at pure noise and 0 at data, `x = (1 - sigma) * x0 + sigma * noise`. A schedule is fp32 on
the CPU, has one entry more than there are steps, descends strictly and ends in exactly 0. `strength` cuts the grid
*before* the shift warps it, as the published pipelines do, so a shifted schedule starts above `strength`. All steps
always run; a lower strength makes them smaller.

The arithmetic is fp32 in the order of the published code, so that a seed gives the same image as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.arguments import check_integer, check_number, check_tensors

FLUX1_SIGMA_MIN = 0.003 / 1.002
"""Last level of FLUX.1's grid before the shift; the last step goes from there to 0."""

QWEN_IMAGE_TERMINAL = 0.02
"""Last level of Qwen-Image before 0."""

TRAINING_MU = 0.8
"""Shift with which FLUX.2 and Qwen-Image are trained, for every image size."""

_MOST_STEPS, _MOST_TOKENS = 10**6, 10**12
"""Largest values of arguments; more are a mistake."""

LIGHTNING_MU = math.log(3)
"""Shift with which Qwen-Image-Lightning is distilled, for every image size."""


def z_image_sigmas(num_steps: int, *, shift: float = 3.0, strength: float = 1.0) -> Float[Tensor, "steps_plus_1"]:
    """Return an fp32 tensor of the `num_steps + 1` noise levels of Z-Image: a uniform grid from `strength` down,
    shifted, and then 0.

    Z-Image team 2025, arXiv:2511.22699.

    Args:
        num_steps: calls of the network, at least 1.
        shift: above 0; 1.0 keeps the grid uniform, larger values spend more steps near pure noise.
        strength: start of the unshifted grid, in (0, 1]; below 1 for image-to-image.

    Raises:
        ValueError: an argument out of range.
    """
    _check(num_steps, strength)
    return _schedule(shift_sigmas(_uniform(num_steps, strength), shift))


def wan_sigmas(num_steps: int, *, shift: float = 5.0, strength: float = 1.0) -> Float[Tensor, "steps_plus_1"]:
    """Return an fp32 tensor of the `num_steps + 1` noise levels of Wan 2.1 and 2.2: those of Z-Image, but with a
    default shift of 5.

    Wan team 2025, arXiv:2503.20314. Arguments and errors are those of `z_image_sigmas`.
    """
    return z_image_sigmas(num_steps, shift=shift, strength=strength)


def flux1_sigmas(num_steps: int, *, shift: float = 3.0, strength: float = 1.0) -> Float[Tensor, "steps_plus_1"]:
    """Return an fp32 tensor of the `num_steps + 1` noise levels of FLUX.1: a uniform grid from 1 (lower with `strength`
    below 1) to 0.003/1.002, shifted, and then 0.

    The grid goes from 1 to 0.003/1.002, inclusive. With one step it is its first entry.

    Args:
        num_steps: calls of the network, at least 1.
        shift: above 0; 1.0 is no shift.
        strength: in (0, 1]; interpolates the start of the grid between its two ends.

    Raises:
        ValueError: an argument out of range.
    """
    _check(num_steps, strength)
    start = FLUX1_SIGMA_MIN + (1 - FLUX1_SIGMA_MIN) * strength
    return _schedule(shift_sigmas(torch.linspace(start, FLUX1_SIGMA_MIN, num_steps), shift))


def flux1_original_sigmas(
    num_steps: int, *, num_tokens: int | None = None, shift: float | None = None, strength: float = 1.0
) -> Float[Tensor, "steps_plus_1"]:
    """Return an fp32 tensor of the `num_steps + 1` noise levels of FLUX.1 in the code of Black Forest Labs, and in
    diffusers: a uniform grid from 1 (lower with `strength` below 1) to 1/num_steps, shifted, and then 0.

    Args:
        num_steps: calls of the network, at least 1.
        num_tokens: image tokens, `(height // 16) * (width // 16)`; their log shift is that of `flux1_mu`.
        shift: above 0; has precedence over `num_tokens`. Without both there is no shift, as for FLUX.1-schnell.
        strength: start of the unshifted grid, in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """
    _check(num_steps, strength)
    if num_tokens is not None:
        check_integer("num_tokens", num_tokens, least=1, most=_MOST_TOKENS)
    end = 1 / num_steps
    levels = torch.linspace(end + (1 - end) * strength, end, num_steps)
    if shift is None and num_tokens is not None:
        return _schedule(shift_sigmas_by_mu(levels, flux1_mu(num_tokens)))
    return _schedule(shift_sigmas(levels, 1.0 if shift is None else shift))


def flux2_sigmas(
    num_steps: int, *, num_tokens: int | None = None, mu: float | None = None, strength: float = 1.0
) -> Float[Tensor, "steps_plus_1"]:
    """Return an fp32 tensor of the `num_steps + 1` noise levels of FLUX.2: a uniform grid from 1 (lower with `strength`
    below 1) to 1/num_steps, shifted, and then 0.

    The log shift `mu` grows with the image, if `num_tokens` is given.

    With one step it starts at 1 for every `strength`, because the two ends of the grid coincide.

    Args:
        num_steps: calls of the network, at least 1.
        num_tokens: image tokens, `(height // 16) * (width // 16)` of the *rounded* size; gives `mu` by `flux2_mu`.
        mu: log of the shift; has precedence over `num_tokens`. Without both it is that of training, 0.8.
        strength: start of the unshifted grid, in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """
    _check(num_steps, strength)
    if mu is None:
        mu = TRAINING_MU if num_tokens is None else flux2_mu(num_tokens, num_steps=num_steps)
    end = 1 / num_steps
    return _schedule(shift_sigmas_by_mu(torch.linspace(end + (1 - end) * strength, end, num_steps), mu))


def qwen_image_sigmas(
    num_steps: int, *, num_tokens: int | None = None, mu: float | None = None, strength: float = 1.0
) -> Float[Tensor, "steps_plus_1"]:
    """Return an fp32 tensor of the `num_steps + 1` noise levels of Qwen-Image: a uniform grid from `strength` down,
    shifted, stretched to end at 0.02 (unless it has one step), and then 0.

    arXiv:2508.02324. The stretch `1 - (1 - sigma) / k` keeps 1 fixed and moves the last level to 0.02. Two edge cases:
    * One step is not stretched. Its only level is the last one, so the formula would give 0/0 at full strength, and
      a start of 0.02, which does not denoise, below it; the schedule is `[shifted strength, 0]` instead.
    * As strength goes to 0 every level goes to 0.02, not to 0.

    Args:
        num_steps: calls of the network, at least 1.
        num_tokens: image tokens, `(height // 16) * (width // 16)` of the *rounded* size; gives `mu` by `qwen_image_mu`.
        mu: log of the shift; has precedence over `num_tokens`. Without both it is that of training, 0.8.
        strength: start of the unshifted grid, in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """
    _check(num_steps, strength)
    if mu is None:
        mu = TRAINING_MU if num_tokens is None else qwen_image_mu(num_tokens)
    levels = shift_sigmas_by_mu(_uniform(num_steps, strength), mu)
    return _schedule(levels if num_steps == 1 else _stretch_to_terminal(levels, QWEN_IMAGE_TERMINAL))


def qwen_image_lightning_sigmas(
    num_steps: int, *, mu: float = LIGHTNING_MU, strength: float = 1.0
) -> Float[Tensor, "steps_plus_1"]:
    """Return an fp32 tensor of the `num_steps + 1` noise levels of Qwen-Image-Lightning: a uniform grid from `strength`
    down, shifted by `exp(mu)` (by default 3), and then 0.

    Args:
        num_steps: calls of the network, at least 1.
        mu: log of the shift.
        strength: start of the unshifted grid, in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """
    _check(num_steps, strength)
    return _schedule(shift_sigmas_by_mu(_uniform(num_steps, strength), mu))


@dataclass(frozen=True, eq=False)
class BetaSchedule:
    """The noise levels of a network that is trained with betas, and their training timesteps.

    Such a network (DDPM, Ho et al. 2020, arXiv:2006.11239; Stable Diffusion) is trained on
    `sqrt(abar_t) * x0 + sqrt(1 - abar_t) * noise` and takes the integer `t`; `abar` are the cumulative products of
    `1 - beta`. Divided by `sqrt(abar_t) + sqrt(1 - abar_t)`, the state has the noise level
    `sigma = sqrt(1 - abar_t) / (sqrt(abar_t) + sqrt(1 - abar_t))` of our convention. Conversions of what the network
    predicts are in `diffsynth.sampling.prediction`.

    Args:
        alphas_cumprod: `abar` of each training timestep, `(train_steps,)`, fp32 or fp64, on the CPU, strictly
            descending, in [0, 1). A last value of 0 is zero terminal SNR (arXiv:2305.08891). Published tables are fp32;
            `linear`, `scaled_linear` and `cosine` compute in fp64.

    Raises:
        ValueError: another dtype, fewer than two values, values out of range or not descending, or so close to each
            other that noise levels coincide in fp32.
    """

    alphas_cumprod: Float[Tensor, " train_steps"]

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        check_tensors(alphas_cumprod=table)
        if table.dtype not in (torch.float32, torch.float64) or table.ndim != 1 or len(table) < 2:
            raise ValueError(
                f"alphas_cumprod is {table.dtype} {tuple(table.shape)}; expected float32 or float64 in one axis, "
                f"at least 2 values"
            )
        if not (table[0] < 1 and table[-1] >= 0 and (self.levels.diff() > 0).all()):  # NaN is refused, too
            raise ValueError(
                f"alphas_cumprod goes from {table[0]:.6g} to {table[-1]:.6g}; expected values below 1 and of at least "
                f"0, each lower than the one before"
            )

    @classmethod
    def linear(cls, train_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> BetaSchedule:
        """Return the `BetaSchedule` of betas in equal steps from `beta_start` to `beta_end`, by default that of DDPM.

        Args:
            train_steps: number of training timesteps, at least 2.
            beta_start: first beta, in (0, 1).
            beta_end: last beta, in (0, 1).

        Raises:
            ValueError: an argument out of range.
        """
        _check_betas(train_steps, beta_start=beta_start, beta_end=beta_end)
        return cls(_products(torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float64)))

    @classmethod
    def scaled_linear(
        cls, train_steps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> BetaSchedule:
        """Return the `BetaSchedule` of betas whose square roots are in equal steps from that of `beta_start` to that of
        `beta_end`, by default that of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752).

        Arguments and errors are those of `linear`.
        """
        _check_betas(train_steps, beta_start=beta_start, beta_end=beta_end)
        roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), train_steps, dtype=torch.float64)
        return cls(_products(roots.square()))

    @classmethod
    def cosine(cls, train_steps: int = 1000, *, offset: float = 0.008, beta_max: float = 0.999) -> BetaSchedule:
        """Return the `BetaSchedule` of `abar_t = f(t) / f(0)`, `f(t) = cos^2((t / train_steps + s) / (1 + s) * pi / 2)`
        (Nichol & Dhariwal 2021, arXiv:2102.09672).

        Args:
            train_steps: number of training timesteps, at least 2.
            offset: `s`, at least 0.
            beta_max: largest beta, in (0, 1); it limits those near the end.

        Raises:
            ValueError: an argument out of range.
        """
        check_number("offset", offset, least=0, note="the paper uses 0.008")
        _check_betas(train_steps, beta_max=beta_max)
        times = torch.linspace(0, 1, train_steps + 1, dtype=torch.float64)
        wanted = ((times + offset) / (1 + offset) * (math.pi / 2)).cos().square()
        return cls(_products((1 - wanted[1:] / wanted[:-1]).clamp(max=beta_max)))

    @cached_property
    def levels(self) -> Float[Tensor, " train_steps"]:
        """The noise level sigma of each training timestep, an fp32 tensor, strictly ascending, in (0, 1]."""
        signal, noise = self.alphas_cumprod.double().sqrt(), (1 - self.alphas_cumprod.double()).sqrt()
        return (noise / (signal + noise)).float()

    def sigmas(self, num_steps: int) -> Float[Tensor, "steps_plus_1"]:
        """Return an fp32 tensor of `num_steps + 1` noise levels: those of training timesteps in trailing spacing, and
        then 0.

        Trailing spacing (Lin et al. 2023, arXiv:2305.08891, table 2) starts at the last training timestep, so that
        sampling starts at the level of most noise: `t_i = round(train_steps * (1 - i / num_steps)) - 1`. `timestep`
        returns these timesteps exactly.

        Args:
            num_steps: calls of the network, at least 1 and at most the number of training timesteps.

        Raises:
            ValueError: `num_steps` out of range.
        """
        check_integer("num_steps", num_steps, least=1, most=_MOST_STEPS)
        train_steps = len(self.alphas_cumprod)
        if num_steps > train_steps:
            raise ValueError(f"num_steps={num_steps!r}: expected at most {train_steps}, one per training timestep")
        steps = torch.arange(num_steps, dtype=torch.float64)
        timesteps = (train_steps - steps * (train_steps / num_steps)).round().long() - 1
        return torch.cat([self.levels[timesteps], torch.zeros(1)])

    def timestep(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the training timestep of each noise level, an fp32 tensor in [0, train_steps - 1], on the device of
        `sigma`.

        A level of the table gives its integer exactly; between two levels it is interpolated linearly; beyond the first
        or last level it is the first or last timestep.

        Args:
            sigma: noise levels, fp32.

        Raises:
            TypeError: `sigma` is no floating-point tensor.
            ValueError: it has more or fewer than one axis.
        """
        check_tensors(sigma=sigma)
        if sigma.ndim != 1:
            raise ValueError(f"sigma is {tuple(sigma.shape)}; expected one axis, (b,)")
        levels = self.levels.to(sigma.device)
        above = (levels < sigma[:, None]).sum(dim=1).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return above - 1 + ((sigma - low) / (high - low)).clamp(0, 1)


def shift_sigmas(sigmas: Float[Tensor, " steps"], shift: float) -> Float[Tensor, " steps"]:
    """Return a tensor of the noise levels `u` in `sigmas` after a shift `s`, `s*u / (1 + (s-1)*u)`, which keeps 0 and
    1; `s` above 1 moves them toward 1.

    SD3, Esser et al. 2024, arXiv:2403.03206. A shift below 1 moves them toward 0.

    Raises:
        ValueError: `shift` is not a finite number above 0.
        TypeError: `sigmas` is no floating-point tensor.
    """
    check_number("shift", shift, above=0, note="1.0 is no shift")
    check_tensors(sigmas=sigmas)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shift_sigmas_by_mu(sigmas: Float[Tensor, " steps"], mu: float) -> Float[Tensor, " steps"]:
    """Return a tensor of the noise levels `u` in `sigmas` after a shift of `exp(mu)`, `exp(mu) / (exp(mu) + 1/u - 1)`,
    as in FLUX.2 and Qwen-Image; `mu` above 0 moves them toward 1.

    Raises:
        ValueError: `mu` is not a number in [-80, 80], beyond which `exp(mu)` leaves fp32.
        TypeError: `sigmas` is no floating-point tensor.
    """
    check_number("mu", mu, least=-80, most=80, note="published models use 0.3 to 3")
    check_tensors(sigmas=sigmas)
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def flux1_mu(num_tokens: int) -> float:
    """Return the log of FLUX.1-dev's shift in the code of Black Forest Labs, a float, linear in `num_tokens`: 0.5 for
    256 tokens, 1.15 for 4096, not clamped.

    Raises:
        ValueError: `num_tokens` is not a positive integer.
    """
    check_integer("num_tokens", num_tokens, least=1, most=_MOST_TOKENS)
    return 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)


def flux2_mu(num_tokens: int, *, num_steps: int) -> float:
    """Return the log of FLUX.2's shift, a float, linear in `num_tokens`; up to 4300 tokens it is also linear in
    `num_steps`.

    Raises:
        ValueError: `num_tokens` or `num_steps` is not a positive integer.
    """
    check_integer("num_tokens", num_tokens, least=1, most=_MOST_TOKENS)
    check_integer("num_steps", num_steps, least=1, most=_MOST_STEPS)
    at_200_steps = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return at_200_steps
    at_10_steps = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (at_200_steps - at_10_steps) / 190
    return slope * num_steps + at_200_steps - 200 * slope


def qwen_image_mu(num_tokens: int) -> float:
    """Return the log of Qwen-Image's shift, a float, linear in `num_tokens`: 0.5 for 256 tokens, 0.9 for 8192, not
    clamped.

    Raises:
        ValueError: `num_tokens` is not a positive integer.
    """
    check_integer("num_tokens", num_tokens, least=1, most=_MOST_TOKENS)
    return 0.5 + (0.9 - 0.5) * (num_tokens - 256) / (8192 - 256)


def qwen_image_layered_mu(num_tokens: int) -> float:
    """Return the log of Qwen-Image-Layered's shift, a float, the square root of `num_tokens / 256`: 2.5 for the 1600
    tokens of 640 x 640 pixels.

    Raises:
        ValueError: `num_tokens` is not a positive integer.
    """
    check_integer("num_tokens", num_tokens, least=1, most=_MOST_TOKENS)
    return float((num_tokens / 256) ** 0.5)


def _uniform(num_steps: int, strength: float) -> Float[Tensor, " steps"]:
    return torch.linspace(strength, 0, num_steps + 1)[:-1]


def _stretch_to_terminal(sigmas: Float[Tensor, " steps"], terminal: float) -> Float[Tensor, " steps"]:
    scale = (1 - sigmas[-1]) / (1 - terminal)
    return 1 - (1 - sigmas) / scale


def _schedule(levels: Float[Tensor, " steps"]) -> Float[Tensor, "steps_plus_1"]:
    """Return a tensor of `levels`, clamped to at most 1, and a final 0; levels that rounding made equal are moved
    apart, so that all descend strictly.

    Levels coincide if strength is tiny (a FLUX.2 grid of 1e-8 around 1/num_steps) or the shift extreme (FLUX.2 at 4200
    pixels a side). They are moved apart by one unit in the last place, which does not affect a network.

    Raises:
        ValueError: a shift so strong that most levels round to 1.
    """
    if not levels.isfinite().all():
        raise ValueError(f"the shift is too strong for {len(levels)} steps: levels leave the range of fp32; lower it")
    if len(levels) > 1 and not (levels < 1).sum() >= len(levels) / 2:
        raise ValueError(f"the shift is too strong for {len(levels)} steps: levels near 1 coincide in fp32; lower it")
    sigmas = torch.cat([levels.clamp(max=1), torch.zeros(1)])
    # Neighbouring fp32 numbers above 0 have consecutive bit patterns, so that "at least one unit above the next level"
    # is "at least 1 more". With the index added, this is a running maximum.
    index = torch.arange(len(sigmas))
    raised = (sigmas.view(torch.int32) + index).flip(0).cummax(0).values.flip(0)
    raised[0] = raised[0].clamp(max=0x3F800000)  # the bits of 1.0
    lowered = torch.cat([raised[:-1].cummin(0).values, raised[-1:]])
    return (lowered - index).int().view(torch.float32)


def _products(betas: Float[Tensor, " train_steps"]) -> Float[Tensor, " train_steps"]:
    return (1 - betas).cumprod(dim=0)


def _check_betas(train_steps: int, **betas: float) -> None:
    check_integer("train_steps", train_steps, least=2)
    for name, beta in betas.items():
        check_number(name, beta, above=0, below=1)


def _check(num_steps: int, strength: float) -> None:
    check_integer("num_steps", num_steps, least=1, most=_MOST_STEPS)
    check_number("strength", strength, above=0, most=1)
