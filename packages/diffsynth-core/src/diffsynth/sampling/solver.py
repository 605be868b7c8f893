"""Solvers, which integrate `dx/dsigma = velocity(x, sigma)` from noise to data.

A solver is a step function and the loop `solve`. A step function takes a state at `sigmas[index]` and returns the state
at `sigmas[index + 1]`. A state is a NamedTuple of tensors, `latents` first: everything that a step reads from the steps
before it, each tensor in the shape, dtype and device of the latents. Before the first step, fields of earlier levels
hold the latents; steps that have no earlier level do not read them.

With `x = (1 - sigma) * x0 + sigma * noise`, the network's velocity `v = noise - x0` at latents `x` gives two
predictions: data `x - sigma * v`, and noise `x + (1 - sigma) * v`. The multistep solvers extrapolate the data
prediction in `lambda = log((1 - sigma) / sigma)`, half the logarithm of the signal-to-noise ratio. It is infinite at
sigma 1 and 0; there each solver uses the limit of its formula, so that schedules from 1 to 0 need no smallest distance
from either. Coefficients are computed in double precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from jaxtyping import Float
from torch import Tensor

from diffsynth.core.arguments import check_functions, check_tensors
from diffsynth.errors import shortened, shown

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`(latents, sigma) -> noise - x0`; sigma is a 0-dim fp32 tensor."""

Noise = Callable[[int], Tensor]
"""`index of a step -> standard normal noise` in the shape, dtype and device of the latents."""

OnStep = Callable[[int, Tensor], None]
"""Called with the index of a step and the latents after it."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps the list of steps, as `tqdm` does."""


class State(Protocol):
    """Argument and result of a step function: a NamedTuple of tensors, `latents` first."""

    @property
    def latents(self) -> Tensor:
        """Return a tensor, the latents at the current noise level."""


StateT = TypeVar("StateT", bound=State)

Item = TypeVar("Item")


class SingleStepState(NamedTuple):
    """State of solvers that use no earlier step: the latents alone."""

    latents: Float[Tensor, "b ..."]


class MultistepState(NamedTuple):
    """State of DPM-Solver++(2M).

    Args:
        latents: at the current level.
        x0_before: data prediction at the level before.
    """

    latents: Float[Tensor, "b ..."]
    x0_before: Float[Tensor, "b ..."]


class UniPCState(NamedTuple):
    """State of UniPC of order 2.

    Args:
        latents: at the current level, as the predictor made them.
        corrected_before: latents at the level before, corrected.
        x0_before: data prediction at the level before.
        x0_two_before: data prediction at the level before that.
    """

    latents: Float[Tensor, "b ..."]
    corrected_before: Float[Tensor, "b ..."]
    x0_before: Float[Tensor, "b ..."]
    x0_two_before: Float[Tensor, "b ..."]


def solve(
    step: Callable[[StateT, Float[Tensor, "steps_plus_1"], int], StateT],
    state: StateT,
    sigmas: Float[Tensor, "steps_plus_1"],
    *,
    on_step: OnStep | None = None,
    progress: Progress = iter,
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at noise level `sigmas[-1]`, after one call of `step` for each pair of neighbouring
    levels.

    The progress bar shows the steps and does not choose them: whatever its items are, all steps run once, in order.

    Args:
        step: `(state, sigmas, index) -> state`, from level `sigmas[index]` to `sigmas[index + 1]`.
        state: state at `sigmas[0]`.
        sigmas: noise levels, fp32, strictly descending; see `diffsynth.sampling.schedule`.
        on_step: called after each step with its index and the new latents.
        progress: wraps the list of the steps' indices, as `tqdm` does.

    Raises:
        TypeError: `sigmas` or the latents are no floating-point tensor, `on_step` or `progress` is no function, or
            `progress` returns no iterable.
        ValueError: `sigmas` has fewer than two levels, does not descend strictly, or leaves [0, 1].
    """
    check_tensors(sigmas=sigmas, latents=state.latents)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas is {tuple(sigmas.shape)}; expected num_steps + 1 entries, at least 2")
    if not (sigmas[1:] < sigmas[:-1]).all():
        raise ValueError(f"sigmas is {shortened(sigmas.tolist())}; expected strictly descending levels")
    if on_step is not None:
        check_functions(on_step=on_step)
    if not (sigmas[0] <= 1 and sigmas[-1] >= 0):
        raise ValueError(f"sigmas is {shortened(sigmas.tolist())}; expected levels in [0, 1], 1 for pure noise")
    for index in with_progress(range(len(sigmas) - 1), progress):
        state = step(state, sigmas, index)
        if on_step is not None:
            on_step(index, state.latents)
    return state.latents


def with_progress(items: Iterable[Item], progress: Progress, *, name: str = "progress") -> Iterator[Item]:
    """Yield the items, each once and in order, and advance a progress bar by one for each.

    What the bar yields is not read: one that yields more, fewer or other items, or none, changes nothing.

    Args:
        items: the steps.
        progress: returns an iterable for the list of the items, as `tqdm` does.
        name: of the argument that `progress` is, for the message.

    Raises:
        TypeError: `progress` returns something else.
    """
    check_functions(**{name: progress})
    if not isinstance(items, Iterable):
        raise TypeError(f"items={shown(items)}: expected an iterable")
    items = list(items)
    bar = progress(list(items))
    if not isinstance(bar, Iterable):
        raise TypeError(f"{name} returned {shown(bar)}; expected an iterable over the steps, as of tqdm")
    advance = iter(bar)
    for item in items:
        next(advance, None)
        yield item
    next(advance, None)  # tqdm closes its bar at the end of its items


def euler(
    velocity: Velocity,
    latents: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, "steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    progress: Progress = iter,
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at noise level `sigmas[-1]`, in shape and dtype of `latents`, which are at
    `sigmas[0]`, by one Euler step per pair of neighbouring levels.

    `x_next = x + v * (sigma_next - sigma)`. Rectified flow, Liu et al. 2022, arXiv:2209.03003. Order 1; one evaluation
    of `velocity` per step. Latents keep their dtype between steps, also bf16, as in the published pipelines.

    Args:
        velocity: `(latents, sigma) -> noise - x0`, of the shape of `latents`.
        latents: latents at noise level `sigmas[0]`.
        sigmas: noise levels, fp32, strictly descending; see `diffsynth.sampling.schedule`.
        noise: not used by this solver.
        on_step: called after each step with its index and the new latents.
        progress: wraps the list of steps, as `tqdm` does.

    Raises:
        TypeError: `sigmas` or the latents are no floating-point tensor, or an argument that is no function.
        ValueError: `sigmas` has fewer than two levels, does not descend strictly, or leaves [0, 1].
    """
    check_functions(velocity=velocity)
    return solve(
        functools.partial(euler_step, velocity), SingleStepState(latents), sigmas, on_step=on_step, progress=progress
    )


def euler_step(
    velocity: Velocity, state: SingleStepState, sigmas: Float[Tensor, "steps_plus_1"], index: int
) -> SingleStepState:
    """Return the `SingleStepState` at `sigmas[index + 1]` after one step of `euler`."""
    latents, sigma, sigma_next = state.latents, sigmas[index], sigmas[index + 1]
    return SingleStepState((latents + velocity(latents, sigma) * (sigma_next - sigma)).to(latents.dtype))


def heun(
    velocity: Velocity,
    latents: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, "steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    progress: Progress = iter,
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at noise level `sigmas[-1]`, in shape and dtype of `latents`, by Heun's method:
    an Euler step, and then the same step with the mean of the velocities at both of its ends.

    `x_next = x + (v(x, sigma) + v(x + v * d, sigma_next)) * d / 2` with `d = sigma_next - sigma`. Karras et al. 2022,
    arXiv:2206.00364, Algorithm 1 without noise. Order 2; two evaluations per step, but one in a step to sigma 0, which
    is an Euler step. Both latents that the network sees are in the dtype of `latents`.

    Arguments and errors are those of `euler`.

    Raises:
        TypeError: `sigmas` or the latents are no floating-point tensor, or an argument that is no function.
        ValueError: `sigmas` has fewer than two levels, does not descend strictly, or leaves [0, 1].
    """
    check_functions(velocity=velocity)
    return solve(
        functools.partial(heun_step, velocity), SingleStepState(latents), sigmas, on_step=on_step, progress=progress
    )


def heun_step(
    velocity: Velocity, state: SingleStepState, sigmas: Float[Tensor, "steps_plus_1"], index: int
) -> SingleStepState:
    """Return the `SingleStepState` at `sigmas[index + 1]` after one step of `heun`."""
    latents, sigma, sigma_next = state.latents, sigmas[index], sigmas[index + 1]
    slope = velocity(latents, sigma)
    end = (latents + slope * (sigma_next - sigma)).to(latents.dtype)
    if sigma_next == 0:
        return SingleStepState(end)
    mean = (slope + velocity(end, sigma_next)) / 2
    return SingleStepState((latents + mean * (sigma_next - sigma)).to(latents.dtype))


def dpmpp_2m(
    velocity: Velocity,
    latents: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, "steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    progress: Progress = iter,
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at noise level `sigmas[-1]`, in shape and dtype of `latents`, by DPM-Solver++(2M):
    a multistep method that extrapolates the data prediction of this step and the one before.

    Lu et al. 2022, arXiv:2211.01095, Algorithm 2, for flow matching (alpha is `1 - sigma`). With `h` the growth of
    lambda in a step, `D = x0 + h / (2 * h_before) * (x0 - x0_before)` and
    `x_next = D + (x - D) * sigma_next / sigma`. Order 2; one evaluation per step.

    Three steps are of order 1, Euler's: the first, which has no earlier one; the one after a step from sigma 1, whose
    `h_before` is infinite; and a step to sigma 0, whose `h` is. Latents and the data prediction that is kept for the
    next step have the dtype of `latents`.

    Arguments and errors are those of `euler`.

    Raises:
        TypeError: `sigmas` or the latents are no floating-point tensor, or an argument that is no function.
        ValueError: `sigmas` has fewer than two levels, does not descend strictly, or leaves [0, 1].
    """
    check_functions(velocity=velocity)
    state = MultistepState(latents, x0_before=latents)
    return solve(functools.partial(dpmpp_2m_step, velocity), state, sigmas, on_step=on_step, progress=progress)


def dpmpp_2m_step(
    velocity: Velocity, state: MultistepState, sigmas: Float[Tensor, "steps_plus_1"], index: int
) -> MultistepState:
    """Return the `MultistepState` at `sigmas[index + 1]` after one step of `dpmpp_2m`; `x0_before` is not read if
    `index` is 0.
    """
    latents = state.latents
    x0 = latents - velocity(latents, sigmas[index]) * sigmas[index]
    moved = _on_the_line(latents, _extrapolated(x0, state.x0_before, sigmas, index), sigmas, index)
    return MultistepState(moved.to(latents.dtype), x0_before=x0.to(latents.dtype))


def unipc(
    velocity: Velocity,
    latents: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, "steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    progress: Progress = iter,
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at noise level `sigmas[-1]`, in shape and dtype of `latents`, by UniPC of order 2
    (data prediction, B(h) = exp(h) - 1, called bh2): the predictor is the step of `dpmpp_2m`, and the next step's
    evaluation corrects it.

    Zhao et al. 2023, arXiv:2302.04867, for flow matching (alpha is `1 - sigma`). The corrector replaces latents at
    level i by `x = D + (x_before - D) * sigma / sigma_before`, where D is the mean of the quadratic in lambda through
    the data predictions at levels i - 2, i - 1 and i, weighted by exp(lambda) over the step from i - 1 to i. Data
    predictions are those of the network at predicted latents. Order 3 between levels inside (0, 1); the steps at both
    ends make it 2 for a schedule from 1 to 0. One evaluation per step. `on_step` gets predicted latents.

    A step to sigma 0 is of order 1. The first corrector uses the mean of two data predictions. The formula has a limit
    where level i - 2 is sigma 1: D is then the value with the data prediction at i - 2 left out. Latents and the data
    predictions that are kept have the dtype of `latents`.

    Arguments and errors are those of `euler`.

    Raises:
        TypeError: `sigmas` or the latents are no floating-point tensor, or an argument that is no function.
        ValueError: `sigmas` has fewer than two levels, does not descend strictly, or leaves [0, 1].
    """
    check_functions(velocity=velocity)
    state = UniPCState(latents, corrected_before=latents, x0_before=latents, x0_two_before=latents)
    return solve(functools.partial(unipc_step, velocity), state, sigmas, on_step=on_step, progress=progress)


def unipc_step(velocity: Velocity, state: UniPCState, sigmas: Float[Tensor, "steps_plus_1"], index: int) -> UniPCState:
    """Return the `UniPCState` at `sigmas[index + 1]` after one step of `unipc`: correct the latents at `sigmas[index]`,
    and predict the next ones.

    The fields `corrected_before` and `x0_before` are not read if `index` is 0, nor `x0_two_before` if it is 1.
    """
    latents = state.latents
    x0 = latents - velocity(latents, sigmas[index]) * sigmas[index]
    corrected = latents if index == 0 else _corrected(state, x0, sigmas, index)
    moved = _on_the_line(corrected, _extrapolated(x0, state.x0_before, sigmas, index), sigmas, index)
    return UniPCState(
        moved.to(latents.dtype),
        corrected_before=corrected.to(latents.dtype),
        x0_before=x0.to(latents.dtype),
        x0_two_before=state.x0_before,
    )


def euler_ancestral(
    velocity: Velocity,
    latents: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, "steps_plus_1"],
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    progress: Progress = iter,
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at noise level `sigmas[-1]`, in shape and dtype of `latents`, by ancestral sampling:
    each step replaces a part of the predicted noise by new noise.

    `x_next = (1 - sigma_next) * x0 + sigma_next * (k * n + sqrt(1 - k**2) * new_noise)`, where x0 and n are the data
    and the noise prediction and `k = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))`. With k = 1 it would be an
    Euler step.

    Derivation: in the coordinates `y = x / (1 - sigma)` and `s = sigma / (1 - sigma)`, `y = x0 + s * noise` is the
    variance-exploding process. Its ancestral step (Song et al. 2020, arXiv:2011.13456, appendix F; the sampler
    "Euler a") goes down to `s_down = s_next**2 / s` along `y - x0 = s * n`, and adds noise of variance
    `s_next**2 - s_down**2`, so that the level is `s_next`. With `k = s_next / s` that is
    `y_next = x0 + s_next * k * n + s_next * sqrt(1 - k**2) * new_noise`. Times `1 - sigma_next` it is the formula
    above, in which y and s, infinite at sigma 1, do not occur; there k is 0 and all noise is new.

    One evaluation per step. `noise` is called once per step except a step to sigma 0, where its weight is 0. Latents
    keep their dtype between steps. Arguments are those of `euler`, but this solver needs `noise`.

    Raises:
        ValueError: `noise` is None or returns another shape than that of `latents`, or `sigmas` has fewer than two
            levels, does not descend strictly, or leaves [0, 1].
        TypeError: `sigmas` or the latents are no floating-point tensor, or an argument that is no function.
    """
    check_functions(velocity=velocity)
    if noise is None:
        raise ValueError("euler_ancestral adds noise in each step; pass noise=, a function of the step's index")
    check_functions(noise=noise)
    return solve(
        functools.partial(euler_ancestral_step, velocity, noise),
        SingleStepState(latents),
        sigmas,
        on_step=on_step,
        progress=progress,
    )


def euler_ancestral_step(
    velocity: Velocity, noise: Noise, state: SingleStepState, sigmas: Float[Tensor, "steps_plus_1"], index: int
) -> SingleStepState:
    """Return the `SingleStepState` at `sigmas[index + 1]` after one step of `euler_ancestral`.

    Raises:
        ValueError: `noise` returns another shape than that of the latents.
    """
    latents, sigma, sigma_next = state.latents, float(sigmas[index]), float(sigmas[index + 1])
    slope = velocity(latents, sigmas[index])
    x0 = latents - slope * sigma
    if sigma_next == 0:
        return SingleStepState(x0.to(latents.dtype))
    new_noise = noise(index)
    if new_noise.shape != latents.shape:
        raise ValueError(f"noise({index}) is {tuple(new_noise.shape)}; expected {tuple(latents.shape)}, as the latents")
    kept = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    mixed = (latents + slope * (1 - sigma)) * kept + new_noise * math.sqrt(1 - kept**2)
    return SingleStepState((x0 * (1 - sigma_next) + mixed * sigma_next).to(latents.dtype))


def _on_the_line(
    latents: Float[Tensor, "b ..."], x0: Float[Tensor, "b ..."], sigmas: Float[Tensor, "steps_plus_1"], index: int
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the latents at `sigmas[index + 1]` on the line through data `x0` at level 0 and `latents` at
    `sigmas[index]`.
    """
    return x0 + (latents - x0) * (float(sigmas[index + 1]) / float(sigmas[index]))


def _extrapolated(
    x0: Float[Tensor, "b ..."], x0_before: Float[Tensor, "b ..."], sigmas: Float[Tensor, "steps_plus_1"], index: int
) -> Float[Tensor, "b ..."]:
    """Return a tensor, the data prediction in the middle (in lambda) of a step, on the line through those at its start
    and at the level before; `x0` itself in the first step and in a step to sigma 0.
    """
    if index == 0 or sigmas[index + 1] == 0:
        return x0
    return x0 + (x0 - x0_before) * (_growth(sigmas, index) / (2 * _growth(sigmas, index - 1)))


def _corrected(
    state: UniPCState, x0: Float[Tensor, "b ..."], sigmas: Float[Tensor, "steps_plus_1"], index: int
) -> Float[Tensor, "b ..."]:
    """Return a tensor, UniPC's corrected latents at `sigmas[index]`, where the data prediction is `x0`; `index` is at
    least 1.
    """
    change = x0 - state.x0_before
    if index == 1:
        mean = state.x0_before + change / 2
    else:
        h, h_before = _growth(sigmas, index - 1), _growth(sigmas, index - 2)
        first, second = _moments(h)
        curvature = (first - second) / (1 + h_before / h)  # 0 where h_before is infinite
        change_before = (state.x0_before - state.x0_two_before) * (curvature * h / h_before)
        mean = state.x0_before + change * (first - curvature) + change_before
    return _on_the_line(state.corrected_before, mean, sigmas, index - 1)


def _moments(h: float) -> tuple[float, float]:
    """Return (mean, mean square), two floats, of a number u in [0, 1] with density proportional to exp(h * u)."""
    if h < 1e-3:  # the closed form loses its digits to cancellation
        return 1 / 2 + h / 12, 1 / 3 + h / 12 + h * h / 360
    inverse = 1 / math.expm1(-h)
    mean = -1 / h - inverse
    return mean, -2 * mean / h - inverse


def _growth(sigmas: Float[Tensor, "steps_plus_1"], index: int) -> float:
    """Return a float, the growth of lambda from `sigmas[index]` to `sigmas[index + 1]`, above 0; inf from 1 or to 0."""
    sigma, sigma_next = float(sigmas[index]), float(sigmas[index + 1])
    if sigma >= 1 or sigma_next <= 0:
        return math.inf
    return math.log(sigma / sigma_next) + math.log1p(-sigma_next) - math.log1p(-sigma)
