"""Tests of the solvers: against diffusers' schedulers, against solutions in closed form, and their common interface."""

from __future__ import annotations

import functools
import itertools
import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from diffsynth.sampling import solver as solvers
from diffsynth.sampling.schedule import flux1_sigmas, flux2_sigmas, z_image_sigmas
from diffsynth.sampling.solver import (
    MultistepState,
    SingleStepState,
    UniPCState,
    dpmpp_2m,
    euler,
    euler_ancestral,
    heun,
    solve,
    unipc,
    with_progress,
)
from flow_schedulers import flow_scheduler, set_levels

DETERMINISTIC = [euler, heun, dpmpp_2m, unipc]
SOLVERS = [*DETERMINISTIC, euler_ancestral]
STATES = {
    euler: SingleStepState,
    heun: SingleStepState,
    dpmpp_2m: MultistepState,
    unipc: UniPCState,
    euler_ancestral: SingleStepState,
}
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.__name__)


class Net:
    """A small nonlinear velocity field on latents `b 4 h w`, in the dtype of the latents."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.into, self.out = (torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(2))
        self.bias = torch.randn(16, generator=generator, dtype=torch.float64)

    def __call__(self, latents, sigma):
        into, out, bias = (weight.to(latents.dtype) for weight in (self.into, self.out, self.bias))
        hidden = torch.tanh(torch.einsum("bchw,ck->bhwk", latents, into) / 2 + 3 * sigma.to(latents.dtype) * bias)
        return torch.einsum("bhwk,ck->bchw", hidden, out) / 2


NET = Net()


def start(dtype=torch.float32, seed=2):
    return torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(latents):
    """Return a function of the step that draws noise for `latents` from one seeded generator."""
    generator = torch.Generator().manual_seed(7)
    return lambda index: torch.randn(latents.shape, generator=generator, dtype=latents.dtype)


def run(solver, velocity, latents, sigmas, **options):
    return solver(velocity, latents, sigmas, noise=seeded(latents), **options)


# Against diffusers. Its schedulers get our levels, in the dtype of the latents, so that both compute the same thing.


def diffusers_steps(name, velocity, latents, sigmas):
    """Return the latents after all steps of the scheduler of that name."""
    scheduler = flow_scheduler(name)
    set_levels(scheduler, sigmas.to(latents.dtype))
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        prediction = velocity(latents, sigma)
        (latents, *_) = scheduler.step(prediction, timestep, latents, return_dict=False)
    return latents


def diffusers_euler_ancestral(velocity, latents, sigmas):
    """Its coordinates are `x / (1 - sigma)` and `sigma / (1 - sigma)`; the network predicts noise."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(len(sigmas) - 1)
    levels = sigmas.to(latents.dtype)
    scheduler.sigmas = levels / (1 - levels)
    generator = torch.Generator().manual_seed(7)
    exploding = latents / (1 - levels[0])
    for index, sigma in enumerate(sigmas[:-1]):
        timestep = scheduler.timesteps[index]
        scheduler.scale_model_input(exploding, timestep)  # step() warns without it; its result is for other networks
        alpha = 1 - levels[index]
        latents = exploding * alpha
        noise = latents + alpha * velocity(latents, sigma)
        (exploding, _) = scheduler.step(noise, timestep, exploding, generator=generator, return_dict=False)
    return exploding


ORACLES = {solver: functools.partial(diffusers_steps, solver.__name__) for solver in DETERMINISTIC}
ORACLES[euler_ancestral] = diffusers_euler_ancestral


def tolerance(solver, dtype):
    """Return the largest difference allowed, about twice the one measured; the latents are at most 3.2.

    Only UniPC's scheduler computes its steps in fp64. That of ancestral sampling holds latents that are divided by
    `1 - sigma`, 150 times ours at the first level.
    """
    if solver is unipc and dtype == torch.float64:
        return 5e-15
    return 5e-5 if solver is euler_ancestral else 3e-6


BARS = {
    reversed: "reversed",
    enumerate: "enumerate",
    (lambda items: items[:1]): "fewer",
    (lambda items: [*items, *items]): "more",
    (lambda items: ()): "none",
    (lambda items: itertools.repeat(None)): "endless",
}
"""Progress bars that give other items than they get."""


@every_solver
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_latents_are_those_of_diffusers(solver, num_steps, dtype):
    """Measured: 0 (Euler), 2.4e-7 (Heun), 1.2e-6 (2M), 7.2e-7 (UniPC), 2.6e-5 (ancestral) in fp32; in fp64 4.6e-7,
    4.1e-7, 7.3e-7, 1.3e-15 and 1.3e-5.
    """
    sigmas, latents = z_image_sigmas(num_steps, strength=0.98), start(dtype)
    assert 0.99 < sigmas[0] < 1
    ours = run(solver, NET, latents, sigmas)
    theirs = ORACLES[solver](NET, latents, sigmas)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=tolerance(solver, dtype), rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("solver", [dpmpp_2m, unipc])
def test_the_limit_at_sigma_1_is_that_of_diffusers(solver, num_steps):
    """Infinities cancel in their formulas, too. Measured: 9.5e-7."""
    sigmas, latents = z_image_sigmas(num_steps), start()
    assert sigmas[0] == 1
    ours, theirs = solver(NET, latents, sigmas), ORACLES[solver](NET, latents, sigmas)
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigmas", [z_image_sigmas(7), flux1_sigmas(4)], ids=["z_image", "flux1"])
def test_euler_is_bit_equal_to_the_loop_of_its_formula(sigmas, dtype):
    latents = expected = start(dtype)
    for sigma, sigma_next in pairwise(sigmas):
        expected = (expected + NET(expected, sigma) * (sigma_next - sigma)).to(dtype)
    assert torch.equal(euler(NET, latents, sigmas), expected)


def test_euler_is_bit_equal_to_diffusers():
    latents, sigmas = start(), z_image_sigmas(8)
    assert torch.equal(euler(NET, latents, sigmas), ORACLES[euler](NET, latents, sigmas))


# Against solutions in closed form.


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("solver", DETERMINISTIC, ids=lambda solver: solver.__name__)
def test_a_straight_path_is_followed_exactly(solver, num_steps):
    x0, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    result = solver(lambda x, sigma: noise - x0, noise, z_image_sigmas(num_steps))
    torch.testing.assert_close(result, x0, atol=1e-6, rtol=0)


MEAN, DEVIATION = 2.0, 2.0


def flow_of_normal_data(latents, sigma):
    """Return the exact velocity for data of a normal distribution."""
    level = sigma.double()
    variance = ((1 - level) * DEVIATION) ** 2 + level**2
    distance = (latents - (1 - level) * MEAN) / variance
    return level * distance - (MEAN + (1 - level) * DEVIATION**2 * distance)


def normal_path(sigma):
    """Return the solution for that velocity that begins one standard deviation above the mean."""
    return (1 - sigma) * MEAN + math.sqrt(((1 - sigma) * DEVIATION) ** 2 + sigma**2)


def error_on_normal_path(solver, sigmas):
    first, last = sigmas[0].item(), sigmas[-1].item()
    end = solver(flow_of_normal_data, torch.full((1,), normal_path(first), dtype=torch.float64), sigmas)
    return abs(end.item() - normal_path(last))


@pytest.mark.parametrize(
    ("solver", "factor"), [(euler, 2), (heun, 4), (dpmpp_2m, 4), (unipc, 8)], ids=lambda value: str(value)[:18]
)
def test_order_of_convergence_between_two_levels(solver, factor):
    """Twice as many steps, uniform in lambda from -3 to 3, divide the error by 2, 4, 4 and 8."""

    def error(num_steps):
        growing = torch.linspace(-3, 3, num_steps + 1, dtype=torch.float64)
        return error_on_normal_path(solver, (1 / (1 + growing.exp())).float())

    assert error(64) / error(128) == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize(
    ("solver", "least", "most"), [(euler, 1.9, 2.1), (heun, 3.9, 4.2), (dpmpp_2m, 3.3, 4.1), (unipc, 3.9, 4.4)]
)
def test_order_of_convergence_from_noise_to_data(solver, least, most):
    """Twice as many steps from 1 to 0. The steps at both ends are of order 1, so that even UniPC is of order 2."""

    def error(num_steps):
        return error_on_normal_path(solver, z_image_sigmas(num_steps, shift=1.0))

    assert least < error(64) / error(128) < most


def test_the_error_of_euler_on_a_curved_path():
    def error(num_steps):
        sigmas = z_image_sigmas(num_steps, shift=1.0)
        return (euler(lambda x, sigma: x, torch.ones(1, dtype=torch.float64), sigmas) - torch.e**-1).abs().item()

    assert error(100) < 0.002
    assert error(200) == pytest.approx(error(100) / 2, rel=0.02)


def test_ancestral_sampling_keeps_the_noise_level():
    """With the exact velocity of data at one point, latents at each level are that point and noise of variance 1."""
    x0, sigmas, seen = 0.7, z_image_sigmas(6), []
    latents = torch.randn(1, 4, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = run(
        euler_ancestral,
        lambda x, sigma: (x - x0) / sigma,
        latents,
        sigmas,
        on_step=lambda index, x: seen.append((x - (1 - sigmas[index + 1]) * x0) / sigmas[index + 1]),
    )
    for noise in seen[:-1]:
        assert noise.mean().item() == pytest.approx(0, abs=0.02)
        assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (seen[0] - latents).std().item() == pytest.approx(2**0.5, abs=0.02), "from sigma 1, all noise is new"
    torch.testing.assert_close(result, torch.full_like(result, x0))


# Ends of the schedule.


@every_solver
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_schedules_from_pure_noise_give_finite_latents_at_every_step(solver, num_steps):
    sigmas, seen = z_image_sigmas(num_steps), []
    assert sigmas[0] == 1
    result = run(solver, NET, start(), sigmas, on_step=lambda index, latents: seen.append(latents))
    assert all(latents.isfinite().all() for latents in seen)
    assert len(seen) == num_steps
    assert result.abs().max() < 20


@every_solver
def test_levels_that_nearly_coincide_at_1_give_finite_latents(solver):
    sigmas = flux2_sigmas(9, mu=15.0)
    assert 1 - sigmas[4] < 1e-5
    assert run(solver, NET, start(), sigmas).isfinite().all()


@every_solver
def test_a_schedule_may_end_above_0(solver):
    """The first part of a schedule, and then the rest of it, is the whole for a solver that uses no earlier step."""
    sigmas, latents = z_image_sigmas(6), start()
    noise = [torch.randn(latents.shape, generator=torch.Generator().manual_seed(index)) for index in range(6)]
    middle = solver(NET, latents, sigmas[:4], noise=lambda index: noise[index])
    end = solver(NET, middle, sigmas[3:], noise=lambda index: noise[index + 3])
    whole = solver(NET, latents, sigmas, noise=lambda index: noise[index])
    assert end.isfinite().all()
    assert torch.equal(end, whole) == (STATES[solver] is SingleStepState)


# The interface.


@every_solver
@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_network_sees_every_level_but_the_last(solver, num_steps):
    """Heun's method sees each level after the first twice: at the end of a step, and at the start of the next."""
    seen, sigmas = [], flux1_sigmas(num_steps)
    run(solver, lambda x, sigma: seen.append(sigma) or torch.zeros_like(x), torch.zeros(1, 1, 2, 2), sigmas)
    levels = sigmas[:-1]
    expected = torch.cat((levels[:1], levels[1:].repeat_interleave(2))) if solver is heun else levels
    assert torch.stack(seen).tolist() == expected.tolist()
    assert all(sigma.dtype == torch.float32 and sigma.ndim == 0 for sigma in seen)


@every_solver
@pytest.mark.parametrize("velocity_dtype", [torch.bfloat16, torch.float32])
def test_the_latents_keep_their_dtype_between_steps(solver, velocity_dtype):
    dtypes = []

    def velocity(x, sigma):
        dtypes.append(x.dtype)
        return torch.ones_like(x, dtype=velocity_dtype)

    result = run(
        solver, velocity, start(torch.bfloat16), z_image_sigmas(4), on_step=lambda index, x: dtypes.append(x.dtype)
    )
    assert result.dtype == torch.bfloat16
    assert set(dtypes) == {torch.bfloat16}


@every_solver
def test_bf16_latents_end_near_those_in_fp32(solver):
    sigmas, latents = z_image_sigmas(8), start(torch.bfloat16)
    noise = [torch.randn(latents.shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(8)]
    exact = solver(NET, latents.float(), sigmas, noise=lambda index: noise[index].float())
    rounded = solver(NET, latents, sigmas, noise=lambda index: noise[index])
    assert (rounded.float() - exact).abs().mean() < 0.03 * exact.abs().mean()


@every_solver
def test_on_step_gets_index_and_new_latents_and_the_input_stays(solver):
    steps, latents = [], start()
    before = latents.clone()
    result = run(solver, NET, latents, z_image_sigmas(3), on_step=lambda index, x: steps.append((index, x)))
    assert [index for index, _ in steps] == [0, 1, 2]
    assert steps[-1][1] is result
    assert torch.equal(latents, before)
    first = latents + NET(latents, torch.tensor(1.0)) * (z_image_sigmas(3)[1] - 1)
    assert solver in (heun, euler_ancestral) or torch.allclose(steps[0][1], first, atol=1e-5)


@every_solver
def test_progress_wraps_a_list_it_can_count(solver):
    lengths, taken = [], []

    def progress(steps):
        lengths.append(len(steps))
        for step in steps:
            taken.append(step)
            yield step

    run(solver, NET, start(), z_image_sigmas(5), progress=progress)
    assert lengths == [5]
    assert len(taken) == 5


@every_solver
def test_an_error_of_the_network_passes_through(solver):
    """A call is cancelled by an exception from `velocity`; the steps before it were reported, none after."""
    calls, steps = [], []

    def velocity(x, sigma):
        calls.append(sigma)
        if sigma < 0.8:
            raise KeyboardInterrupt("enough")
        return NET(x, sigma)

    with pytest.raises(KeyboardInterrupt, match="enough"):
        run(solver, velocity, start(), z_image_sigmas(4), on_step=lambda index, x: steps.append(index))
    assert [sigma < 0.8 for sigma in calls] == [False] * (len(calls) - 1) + [True]
    assert steps == ([0] if solver is heun else [0, 1])


@every_solver
def test_a_schedule_without_a_step_is_refused(solver):
    with pytest.raises(ValueError, match=r"sigmas is \(1,\); expected num_steps"):
        run(solver, NET, start(), torch.zeros(1))


@every_solver
@pytest.mark.parametrize("progress", BARS, ids=BARS.get)
def test_the_items_of_a_progress_bar_are_not_read(solver, progress):
    """A bar that yielded more, fewer or other items once ended the call, or changed its result."""
    steps, sigmas = [], z_image_sigmas(4)
    shown = run(solver, NET, start(), sigmas, progress=progress, on_step=lambda index, x: steps.append(index))
    assert torch.equal(shown, run(solver, NET, start(), sigmas))
    assert steps == [0, 1, 2, 3]


def test_a_progress_bar_is_advanced_once_for_each_step_and_then_ends():
    seen = []

    def bar(items):
        for item in items:
            seen.append(item)
            yield item
        seen.append("closed")

    assert list(with_progress("ab", bar)) == ["a", "b"]
    assert seen == ["a", "b", "closed"]


def test_a_progress_bar_that_is_none():
    with pytest.raises(TypeError, match="progress_bar_cmd returned None; expected an iterable over the steps"):
        list(with_progress([1], lambda items: None, name="progress_bar_cmd"))


@every_solver
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 0.5, 0.0], r"sigmas is \[1.0, 0.5, 0.0\], of type list; expected a floating-point tensor"),
        (torch.tensor([1, 0]), "sigmas is a tensor of torch.int64"),
        (np.linspace(1, 0, 3), "sigmas is .*of type ndarray"),
        (torch.tensor([[1.0, 0.0]]), r"sigmas is \(1, 2\)"),
        (torch.tensor([14.6, 1.0, 0.0]), r"expected levels in \[0, 1\]"),
        (torch.tensor([1.0, -0.5]), r"expected levels in \[0, 1\]"),
        (torch.tensor([1.0, float("nan"), 0.0]), "expected strictly descending levels"),
    ],
)
def test_what_is_no_schedule_is_refused(solver, sigmas, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(solver, NET, start(), sigmas)


@every_solver
def test_a_schedule_that_does_not_descend_is_refused(solver):
    with pytest.raises(ValueError, match=r"sigmas is 1.0, 0.5, 0.5, 0.0; expected strictly descending levels"):
        run(solver, NET, start(), torch.tensor([1.0, 0.5, 0.5, 0.0]))


@pytest.mark.parametrize("solver", DETERMINISTIC, ids=lambda solver: solver.__name__)
def test_solvers_of_the_ode_ask_for_no_noise(solver):
    def noise(index):
        raise AssertionError("asked for noise")

    sigmas, latents = z_image_sigmas(4), start()
    assert torch.equal(solver(NET, latents, sigmas, noise=noise), solver(NET, latents, sigmas))


def test_ancestral_sampling_asks_for_noise_in_all_steps_but_the_last():
    asked, latents = [], start()
    noise = seeded(latents)
    euler_ancestral(NET, latents, z_image_sigmas(4), noise=lambda index: asked.append(index) or noise(index))
    assert asked == [0, 1, 2]


def test_ancestral_sampling_without_noise_is_refused_before_the_network_runs():
    with pytest.raises(ValueError, match="euler_ancestral adds noise in each step; pass noise="):
        euler_ancestral(lambda x, sigma: pytest.fail("the network ran"), start(), z_image_sigmas(4))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise\(0\) is \(1, 4, 5, 3\); expected \(2, 4, 5, 3\), as the latents"):
        euler_ancestral(NET, start(), z_image_sigmas(4), noise=lambda index: torch.zeros(1, 4, 5, 3))


# The state.


def step_function(solver, latents):
    step = functools.partial(getattr(solvers, f"{solver.__name__}_step"), NET)
    return functools.partial(step, seeded(latents)) if solver is euler_ancestral else step


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_a_pytree_of_tensors_like_the_latents(solver, dtype):
    """A copy of the state between all steps changes nothing, so it is all that a step takes from earlier ones."""
    latents, kind, states = start(dtype), STATES[solver], []
    step = step_function(solver, latents)

    def copying_step(state, sigmas, index):
        states.append(step(state, sigmas, index))
        return pytree.tree_map(torch.clone, states[-1])

    initial = kind(*[latents] * len(kind._fields))
    result = solve(copying_step, initial, z_image_sigmas(6))
    assert torch.equal(result, run(solver, NET, latents, z_image_sigmas(6)))
    assert kind._fields[0] == "latents"
    assert all(type(state) is kind for state in states)
    leaves = pytree.tree_leaves(states)
    assert len(leaves) == 6 * len(kind._fields)
    assert {(leaf.shape, leaf.dtype) for leaf in leaves} == {(latents.shape, dtype)}


@pytest.mark.parametrize("solver", DETERMINISTIC, ids=lambda solver: solver.__name__)
def test_a_state_can_be_cut_between_steps(solver):
    latents, sigmas, kind = start(), z_image_sigmas(6), STATES[solver]
    step, state = step_function(solver, latents), kind(*[latents] * len(STATES[solver]._fields))
    for index in range(6):
        if index == 3:
            state = pytree.tree_map(lambda tensor: tensor[1:], state)
        state = step(state, sigmas, index)
    torch.testing.assert_close(state.latents, solver(NET, latents, sigmas)[1:])
