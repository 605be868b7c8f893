from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffsynth.sampling.schedule import (
    BetaSchedule,
    flux1_mu,
    flux1_original_sigmas,
    flux1_sigmas,
    flux2_mu,
    flux2_sigmas,
    qwen_image_lightning_sigmas,
    qwen_image_mu,
    qwen_image_sigmas,
    shift_sigmas,
    shift_sigmas_by_mu,
    wan_sigmas,
    z_image_sigmas,
)

SCHEDULES = [
    flux1_sigmas,
    flux2_sigmas,
    qwen_image_lightning_sigmas,
    qwen_image_sigmas,
    wan_sigmas,
    z_image_sigmas,
]
SIZED = [flux2_sigmas, qwen_image_sigmas]


@pytest.mark.parametrize(
    ("sigmas", "expected"),
    [
        pytest.param(flux1_sigmas(4), (1, 0.85769, 0.60215, 0.00893), id="flux1"),
        pytest.param(wan_sigmas(4), (1, 0.9375, 0.83333, 0.625), id="wan"),
        pytest.param(z_image_sigmas(4), (1, 0.9, 0.75, 0.5), id="z_image"),
        pytest.param(qwen_image_sigmas(4, num_tokens=4096), (1, 0.76671, 0.45561, 0.02), id="qwen_image"),
        pytest.param(flux2_sigmas(4, num_tokens=4096), (1, 0.96738, 0.90814, 0.7672), id="flux2"),
        pytest.param(qwen_image_lightning_sigmas(4), (1, 0.9, 0.75, 0.5), id="lightning"),
        pytest.param(qwen_image_lightning_sigmas(4, mu=0.8), (1, 0.86973, 0.68997, 0.4259), id="lightning_training"),
        pytest.param(z_image_sigmas(4, strength=0.5), (0.75, 9 / 14, 0.5, 0.3), id="z_image_strength"),
        pytest.param(z_image_sigmas(4, shift=1.0), (1, 0.75, 0.5, 0.25), id="unshifted"),
    ],
)
def test_four_steps_are_the_published_ones(sigmas, expected):
    torch.testing.assert_close(sigmas, torch.tensor([*expected, 0.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(num_steps=st.integers(1, 200), strength=st.floats(1e-45, 1, exclude_min=True))
@settings(max_examples=60, deadline=None)
def test_every_schedule_descends_strictly_to_zero(schedule, num_steps, strength):
    assert_is_schedule(schedule(num_steps, strength=strength), num_steps)


@pytest.mark.parametrize("schedule", SIZED)
@example(num_steps=80, num_tokens=69_391, strength=1.0)
@given(num_steps=st.integers(1, 100), num_tokens=st.integers(1, 70_000), strength=st.floats(1e-12, 1))
@settings(max_examples=60, deadline=None)
def test_every_size_has_a_schedule(schedule, num_steps, num_tokens, strength):
    assert_is_schedule(schedule(num_steps, num_tokens=num_tokens, strength=strength), num_steps)


@pytest.mark.parametrize("schedule", [flux1_sigmas, wan_sigmas, z_image_sigmas])
@given(num_steps=st.integers(1, 100), shift=st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_every_shift_has_a_schedule(schedule, num_steps, shift):
    assert_is_schedule(schedule(num_steps, shift=shift), num_steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("strength", [1.0, 0.5, 1e-8, 5e-324])
def test_one_step_is_finite(schedule, strength):
    assert_is_schedule(schedule(1, strength=strength), 1)


def test_one_step_of_qwen_image_is_not_stretched():
    """The terminal stretch of a single level is 0/0 at full strength and a start of 0.02 below it.

    Neither denoises, so one step starts where the shift puts it.
    """
    assert qwen_image_sigmas(1).tolist() == [1.0, 0.0]
    torch.testing.assert_close(qwen_image_sigmas(1, strength=0.6), qwen_image_lightning_sigmas(1, mu=0.8, strength=0.6))


def test_strength_towards_zero_ends_where_each_grid_does():
    assert z_image_sigmas(8, strength=1e-9)[0] < 1e-8
    assert wan_sigmas(8, strength=1e-9)[0] < 1e-8
    assert qwen_image_lightning_sigmas(8, strength=1e-9)[0] < 1e-8
    torch.testing.assert_close(qwen_image_sigmas(8, strength=1e-9)[:-1], torch.full((8,), 0.02), atol=1e-5, rtol=0)
    torch.testing.assert_close(flux1_sigmas(8, strength=1e-9)[:-1], torch.full((8,), 0.00893), atol=1e-5, rtol=0)


def test_strength_is_applied_before_the_shift():
    assert flux1_sigmas(4, strength=0.6)[0] == pytest.approx(0.81892, abs=1e-5)


@pytest.mark.parametrize("schedule", SIZED)
def test_mu_has_precedence_over_size_and_without_both_it_is_that_of_training(schedule):
    torch.testing.assert_close(schedule(4, num_tokens=1, mu=0.8), schedule(4), rtol=0, atol=0)


@given(shift=st.floats(0.05, 50), num_steps=st.integers(2, 50))
@settings(max_examples=60, deadline=None)
def test_mu_is_the_log_of_the_shift(shift, num_steps):
    grid = torch.linspace(1, 0, num_steps + 1)[:-1]
    torch.testing.assert_close(shift_sigmas_by_mu(grid, math.log(shift)), shift_sigmas(grid, shift), atol=1e-5, rtol=0)


def test_mu_follows_the_size():
    assert qwen_image_mu(256) == pytest.approx(0.5)
    assert qwen_image_mu(8192) == pytest.approx(0.9)
    assert qwen_image_mu(4096) == pytest.approx(0.69355, abs=1e-5)
    assert flux2_mu(4301, num_steps=4) == flux2_mu(4301, num_steps=50) == pytest.approx(1.18470, abs=1e-5)
    assert flux2_mu(4096, num_steps=200) == pytest.approx(0.00016927 * 4096 + 0.45666666)
    assert flux2_mu(4096, num_steps=10) == pytest.approx(8.73809524e-05 * 4096 + 1.89833333)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0: expected an integer from 1 to"),
        ({"num_steps": -3}, "num_steps=-3"),
        ({"num_steps": 2.0}, "num_steps=2.0"),
        ({"num_steps": True}, "num_steps=True"),
        ({"num_steps": 4, "strength": 0.0}, "strength=0.0: expected a number above 0 and at most 1"),
        ({"num_steps": 4, "strength": 1.01}, "strength=1.01"),
        ({"num_steps": 4, "strength": -1}, "strength=-1"),
        ({"num_steps": 4, "strength": math.nan}, "strength=nan"),
    ],
)
def test_bad_steps_and_strength_are_refused(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(**arguments)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_shift_is_refused(shift):
    with pytest.raises(ValueError, match="shift=.*: expected a finite number above 0"):
        z_image_sigmas(4, shift=shift)


@pytest.mark.parametrize("mu", [81.0, -81.0, math.inf, math.nan])
def test_a_bad_mu_is_refused(mu):
    with pytest.raises(ValueError, match="mu=.*: expected a number from -80 to 80"):
        flux2_sigmas(4, mu=mu)


@pytest.mark.parametrize("schedule", SIZED)
@pytest.mark.parametrize("num_tokens", [0, -1, 4.5])
def test_a_bad_size_is_refused(schedule, num_tokens):
    with pytest.raises(ValueError, match="num_tokens=.*: expected an integer"):
        schedule(4, num_tokens=num_tokens)


def test_a_shift_that_leaves_no_levels_apart_is_refused():
    with pytest.raises(ValueError, match="too strong for 4 steps"):
        z_image_sigmas(4, shift=1e12)
    with pytest.raises(ValueError, match="too strong for 4 steps"):
        qwen_image_sigmas(4, mu=80)


BETAS = {
    "linear": (BetaSchedule.linear, "linear", {}),
    "scaled_linear": (BetaSchedule.scaled_linear, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (BetaSchedule.cosine, "squaredcos_cap_v2", {}),
}


@pytest.mark.parametrize("name", BETAS)
def test_betas_are_those_of_diffusers(name):
    make, schedule, arguments = BETAS[name]
    theirs = DDIMScheduler(beta_schedule=schedule, timestep_spacing="trailing", **arguments)
    ours = make()
    assert ours.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, atol=0, rtol=5e-5)
    for num_steps in (1, 2, 10, 25, 30, 999, 1000):
        theirs.set_timesteps(num_steps)
        sigmas = ours.sigmas(num_steps)
        assert_is_schedule(sigmas, num_steps)
        assert ours.timestep(sigmas[:-1]).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("name", BETAS)
def test_levels_have_the_signal_to_noise_ratio_of_the_betas(name):
    betas = BETAS[name][0]()
    signal, noise = betas.alphas_cumprod.sqrt(), (1 - betas.alphas_cumprod).sqrt()
    sigma = betas.levels.double()
    torch.testing.assert_close(sigma * signal, (1 - sigma) * noise, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", BETAS)
def test_timesteps_are_exact_at_the_grid_and_linear_between(name):
    betas = BETAS[name][0]()
    assert betas.timestep(betas.levels).tolist() == list(range(1000))
    low, high = betas.levels[400], betas.levels[401]
    between = betas.timestep(torch.stack([low + (high - low) * part for part in (0.25, 0.5)]))
    torch.testing.assert_close(between, torch.tensor([400.25, 400.5]), atol=1e-2, rtol=0)
    assert betas.timestep(torch.tensor([0.0, 1.0])).tolist() == [0, 999]
    assert betas.timestep(betas.levels[:3]).dtype == torch.float32


def test_a_published_table_in_fp32_is_taken_as_it_is():
    table = BetaSchedule.scaled_linear().alphas_cumprod.float()
    assert BetaSchedule(table).alphas_cumprod is table
    assert BetaSchedule(torch.tensor([0.9, 0.5, 0.0])).levels[-1] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaSchedule(torch.tensor([0.9, 0.9])), "alphas_cumprod goes from 0.9 to 0.9; expected"),
        (lambda: BetaSchedule(torch.tensor([0.5, 0.9])), "each lower than the one before"),
        (lambda: BetaSchedule(torch.tensor([1.0, 0.5])), "expected values below 1"),
        (lambda: BetaSchedule(torch.tensor([0.5, -0.1])), "alphas_cumprod goes from 0.5 to -0.1"),
        (lambda: BetaSchedule(torch.tensor([0.5, math.nan])), "alphas_cumprod goes from 0.5 to nan"),
        (lambda: BetaSchedule(torch.tensor([0.5])), r"alphas_cumprod is torch.float32 \(1,\); expected"),
        (lambda: BetaSchedule.linear(1), "train_steps=1: expected an integer of at least 2"),
        (lambda: BetaSchedule.linear(beta_end=1.0), "beta_end=1.0: expected a number between 0 and 1"),
        (lambda: BetaSchedule.scaled_linear(beta_start=0.0), "beta_start=0.0"),
        (lambda: BetaSchedule.cosine(offset=-1.0), "offset=-1.0: expected a finite number of at least 0"),
        (lambda: BetaSchedule.linear().sigmas(0), "num_steps=0: expected an integer from 1 to"),
        (lambda: BetaSchedule.linear().sigmas(1001), "num_steps=1001: expected at most 1000"),
    ],
)
def test_bad_betas_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def assert_is_schedule(sigmas, num_steps):
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (num_steps + 1,)
    assert torch.isfinite(sigmas).all()
    assert (sigmas[:-1] > sigmas[1:]).all()
    assert sigmas[0] <= 1
    assert sigmas[-1] == 0


@pytest.mark.parametrize("size", [(256, 256), (512, 768), (1024, 1024), (1632, 1232), (2048, 2048)])
@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
def test_schedules_of_flux_are_those_of_diffusers(size, num_steps):
    """FLUX.1-dev, -Krea-dev and -Kontext-dev, FLUX.1-schnell, and FLUX.2, with the published schedulers' configs."""
    tokens = (size[0] // 16) * (size[1] // 16)
    grid = np.linspace(1.0, 1 / num_steps, num_steps)
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    dev = FlowMatchEulerDiscreteScheduler(base_image_seq_len=256, max_image_seq_len=4096, **dynamic)
    dev.set_timesteps(sigmas=grid, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    torch.testing.assert_close(flux1_original_sigmas(num_steps, num_tokens=tokens), dev.sigmas, rtol=0, atol=1e-6)
    schnell = FlowMatchEulerDiscreteScheduler(shift=1.0)
    schnell.set_timesteps(sigmas=grid)
    torch.testing.assert_close(flux1_original_sigmas(num_steps), schnell.sigmas, rtol=0, atol=1e-6)
    two = FlowMatchEulerDiscreteScheduler(**dynamic)
    two.set_timesteps(sigmas=grid, mu=compute_empirical_mu(tokens, num_steps))
    torch.testing.assert_close(flux2_sigmas(num_steps, num_tokens=tokens), two.sigmas, rtol=0, atol=1e-6)


def test_the_original_schedule_of_flux1():
    assert flux1_original_sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(flux1_original_sigmas(4, shift=3.0)[1:3], torch.tensor([0.9, 0.75]))
    assert flux1_original_sigmas(4, strength=0.5)[0] == 0.625
    assert flux1_mu(256) == 0.5
    assert flux1_mu(4096) == pytest.approx(1.15)
