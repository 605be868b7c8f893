"""Tests of conversions to velocities: each inverts its definition, and Euler with them is DDIM of diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from diffsynth.sampling.noise import add_noise
from diffsynth.sampling.prediction import (
    PREDICTIONS,
    from_variance_preserving,
    variance_preserving,
    velocity_from_epsilon,
    velocity_from_v,
    velocity_from_x0,
)
from diffsynth.sampling.schedule import BetaSchedule
from diffsynth.sampling.solver import euler

SHAPES = [(3, 4, 6, 5), (3, 4, 2, 3, 5)]
LEVELS = torch.tensor([0.9, 0.5, 0.05])
NAMES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
"""Our name -> diffusers' name."""


class TinyNet(nn.Module):
    """A random network of latents and timestep whose output depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, latents, timestep):
        phase = timestep.float().view(-1, 1, 1, 1) / 1000
        return latents + self.out(torch.tanh(self.into(latents) + phase))


def weights(latents, sigma):
    """Return the weights of x0 and noise in VP scaling."""
    level = sigma.view(-1, *[1] * (latents.ndim - 1))
    size = ((1 - level) ** 2 + level**2) ** 0.5
    return (1 - level) / size, level / size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_conversion_inverts_its_definition(shape, dtype):
    x0, noise = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    latents, velocity = add_noise(x0, noise, LEVELS), noise - x0
    alpha, beta = weights(latents, LEVELS)
    close = {"atol": 5e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(velocity_from_epsilon(latents, LEVELS, noise), velocity, **close)
    torch.testing.assert_close(velocity_from_x0(latents, LEVELS, x0), velocity, **close)
    torch.testing.assert_close(velocity_from_v(latents, LEVELS, alpha * noise - beta * x0), velocity, **close)
    torch.testing.assert_close(variance_preserving(latents, LEVELS), alpha * x0 + beta * noise, **close)


def test_variance_preserving_keeps_the_variance():
    x0, noise = torch.randn(3, 4, 64, 64), torch.randn(3, 4, 64, 64)
    scaled = variance_preserving(add_noise(x0, noise, LEVELS), LEVELS)
    torch.testing.assert_close(scaled.std(dim=(1, 2, 3)), torch.ones(3), atol=0.02, rtol=0)


def test_the_two_scalings_are_inverse():
    latents = torch.randn(3, 4, 6, 5)
    there = variance_preserving(latents, LEVELS)
    torch.testing.assert_close(from_variance_preserving(there, LEVELS), latents, atol=1e-6, rtol=1e-6)


def test_levels_that_are_not_singular():
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    ends = torch.tensor([0.0, 1.0])
    latents = add_noise(x0, noise, ends)
    alpha, beta = weights(latents, ends)
    v = alpha * noise - beta * x0
    torch.testing.assert_close(velocity_from_v(latents, ends, v), noise - x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(velocity_from_epsilon(latents[:1], ends[:1], noise[:1]), (noise - x0)[:1])
    torch.testing.assert_close(velocity_from_x0(latents[1:], ends[1:], x0[1:]), (noise - x0)[1:])
    assert not velocity_from_epsilon(latents[1:], ends[1:], noise[1:]).isfinite().any()
    assert not velocity_from_x0(latents[:1], ends[:1], x0[:1]).isfinite().any()


@pytest.mark.parametrize("name", PREDICTIONS)
def test_dtypes(name):
    """The input of a network has the dtype of the latents; differences are not rounded to bf16."""
    prediction = PREDICTIONS[name]
    latents, output = torch.randn(3, 4, 6, 5).bfloat16(), torch.randn(3, 4, 6, 5).bfloat16()
    assert prediction.scale_input(latents, LEVELS).dtype == torch.bfloat16
    velocity = prediction.to_velocity(latents, LEVELS, output)
    assert torch.equal(velocity, prediction.to_velocity(latents.float(), LEVELS, output.float()))
    assert velocity.dtype == (torch.bfloat16 if name == "velocity" else torch.float32)


def test_the_table_of_predictions():
    assert list(PREDICTIONS) == ["velocity", "epsilon", "x0", "v"]
    assert all(name == prediction.name for name, prediction in PREDICTIONS.items())
    latents, output = torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5)
    scaled = [name for name, each in PREDICTIONS.items() if each.scale_input(latents, LEVELS) is not latents]
    assert scaled == ["epsilon", "v"]
    assert PREDICTIONS["velocity"].to_velocity(latents, LEVELS, output) is output


@pytest.mark.parametrize("convert", [velocity_from_epsilon, velocity_from_x0, velocity_from_v])
def test_bad_shapes_are_refused(convert):
    latents = torch.randn(3, 4, 6, 5)
    with pytest.raises(ValueError, match=r" is \(3, 8, 6, 5\), latents are \(3, 4, 6, 5\); expected one shape"):
        convert(latents, LEVELS, torch.randn(3, 8, 6, 5))
    with pytest.raises(ValueError, match=r"sigma is \(1,\); expected \(3,\), one level per entry"):
        convert(latents, LEVELS[:1], latents)
    with pytest.raises(ValueError, match=r"sigma is \(\); expected \(3,\)"):
        variance_preserving(latents, LEVELS[0])


def ours(net, name, betas, noise, num_steps):
    """Return the latents after each step in VP scaling."""
    prediction, sigmas, steps = PREDICTIONS[name], betas.sigmas(num_steps), []

    def velocity(latents, sigma):
        sigma = sigma.expand(len(latents))
        scale = variance_preserving if name == "x0" else prediction.scale_input  # as the network of DDIM takes it
        return prediction.to_velocity(latents, sigma, net(scale(latents, sigma), betas.timestep(sigma)))

    def on_step(index, latents):
        steps.append(variance_preserving(latents, sigmas[index + 1].expand(len(latents))))

    euler(velocity, from_variance_preserving(noise, sigmas[0].expand(len(noise))), sigmas, on_step=on_step)
    return steps


def ddim(net, scheduler, noise, num_steps):
    scheduler.set_timesteps(num_steps)
    latents, steps = noise, []
    for timestep in scheduler.timesteps:
        output = net(latents, timestep.expand(len(latents)))
        latents = scheduler.step(output, timestep, latents, eta=0.0).prev_sample
        steps.append(latents)
    return steps


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_euler_is_ddim(name, schedule):
    """Both are equal in exact arithmetic; in fp32 they differ by rounding, 9e-7 of the largest latent value."""
    net, noise = TinyNet(), torch.randn(2, 4, 8, 8)
    scheduler = DDIMScheduler(
        beta_schedule=schedule, prediction_type=NAMES[name], clip_sample=False, timestep_spacing="trailing"
    )
    betas = BetaSchedule(scheduler.alphas_cumprod)
    theirs = ddim(net, scheduler, noise, 20)
    assert betas.timestep(betas.sigmas(20)[:-1]).tolist() == scheduler.timesteps.tolist()
    assert_same_steps(ours(net, name, betas, noise, 20), theirs)


@pytest.mark.parametrize("name", ["v", "x0"])
@torch.no_grad()
def test_euler_is_ddim_from_pure_noise(name):
    """With zero terminal SNR the first level is exactly 1, where epsilon is singular."""
    net, noise = TinyNet(), torch.randn(2, 4, 8, 8)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=NAMES[name],
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    betas = BetaSchedule(scheduler.alphas_cumprod)
    assert betas.sigmas(20)[0] == 1
    assert_same_steps(ours(net, name, betas, noise, 20), ddim(net, scheduler, noise, 20))


def assert_same_steps(found, expected):
    assert len(found) == len(expected) == 20
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 5e-6 * theirs.abs().max()
    assert (expected[-1] - expected[0]).abs().max() > 0.1
