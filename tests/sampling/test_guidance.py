"""Tests of guidance against the guiders of diffusers, and of APG against the formula of its paper in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from diffsynth.sampling.guidance import (
    adaptive_projected_guidance,
    cfg_zero_star,
    classifier_free_guidance,
    rescaled_guidance,
)

COND, UNCOND = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
SHAPES = [(2, 4, 6, 5), (3, 4, 2, 3, 5)]


def velocities(shape, count=2):
    """Return `count` random velocities in which each entry has another size."""
    sizes = torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    return [torch.randn(shape) * sizes + 0.1 for _ in range(count)]


@pytest.mark.parametrize(
    ("cfg_scale", "expected"), [(0.0, [[1.0, 1.0]]), (1.0, [[3.0, -1.0]]), (4.0, [[9.0, -7.0]]), (-1.0, [[-1.0, 3.0]])]
)
def test_it_extrapolates_from_uncond_through_cond(cfg_scale, expected):
    assert classifier_free_guidance(COND, UNCOND, cfg_scale).tolist() == expected


def test_it_keeps_the_dtype():
    assert classifier_free_guidance(COND.bfloat16(), UNCOND.bfloat16(), 4.0).dtype == torch.bfloat16
    assert rescaled_guidance(COND.bfloat16(), UNCOND.bfloat16(), 4.0).dtype == torch.bfloat16
    assert cfg_zero_star(COND.bfloat16(), UNCOND.bfloat16(), 4.0, index=1).dtype == torch.bfloat16


def test_shapes_that_would_broadcast_are_refused():
    wide = UNCOND.expand(2, 2)
    for guidance in (
        lambda: classifier_free_guidance(COND, wide, 4.0),
        lambda: rescaled_guidance(COND, wide, 4.0),
        lambda: cfg_zero_star(COND, wide, 4.0, index=0),
        lambda: adaptive_projected_guidance(COND, wide, 4.0, latents=COND, sigma=torch.ones(1)),
    ):
        with pytest.raises(ValueError, match=r"velocity_cond is \(1, 2\), velocity_uncond is \(2, 2\)"):
            guidance()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaling_equals_diffusers(shape, rescale):
    cond, uncond = velocities(shape)
    guider = ClassifierFreeGuidance(guidance_scale=6.0, guidance_rescale=rescale)
    ours = rescaled_guidance(cond, uncond, 6.0, guidance_rescale=rescale)
    torch.testing.assert_close(ours, guider.forward(cond, uncond).pred, atol=1e-5, rtol=1e-5)


def test_full_rescaling_gives_each_entry_the_deviation_of_cond():
    cond, uncond = velocities((3, 4, 6, 5))
    guided = rescaled_guidance(cond, uncond, 9.0, guidance_rescale=1.0)
    torch.testing.assert_close(guided.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan])
def test_a_bad_rescale_is_refused(rescale):
    with pytest.raises(ValueError, match="guidance_rescale=.*: expected a number from 0 to 1"):
        rescaled_guidance(COND, UNCOND, 4.0, guidance_rescale=rescale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [-0.5, 0.0])
@pytest.mark.parametrize(("eta", "norm_threshold"), [(0.0, 0.0), (0.5, 2.0), (1.0, 1e3)])
def test_apg_equals_the_guider_of_diffusers_on_denoised_predictions(shape, eta, norm_threshold, momentum):
    guider = AdaptiveProjectedGuidance(
        guidance_scale=5.0, adaptive_projected_guidance_rescale=norm_threshold, eta=eta, use_original_formulation=True
    )
    guider.momentum_buffer = MomentumBuffer(momentum)
    average = None
    for level in (0.9, 0.6, 0.2):
        latents, cond, uncond = velocities(shape, 3)
        sigma = torch.full(shape[:1], level)
        ours, average = adaptive_projected_guidance(
            cond,
            uncond,
            6.0,
            latents=latents,
            sigma=sigma,
            eta=eta,
            norm_threshold=norm_threshold,
            momentum=momentum,
            average=average,
        )
        x0 = guider.forward(latents - level * cond, latents - level * uncond).pred
        torch.testing.assert_close(ours, (latents - x0) / level, atol=5e-5, rtol=1e-6)
        torch.testing.assert_close(average, guider.momentum_buffer.running_average, atol=1e-5, rtol=1e-5)


def test_apg_follows_the_formula_of_the_paper():
    latents, cond, uncond, average = velocities((2, 4, 3, 3), 4)
    sigma = torch.tensor([0.8, 0.3])
    ours, after = adaptive_projected_guidance(
        cond, uncond, 4.0, latents=latents, sigma=sigma, eta=0.25, norm_threshold=3.0, momentum=-0.75, average=average
    )
    for entry, level in enumerate(sigma.double()):
        x, v_cond, v_uncond, past = (each[entry].double().flatten() for each in (latents, cond, uncond, average))
        x0_cond, x0_uncond = x - level * v_cond, x - level * v_uncond
        update = (x0_cond - x0_uncond) - 0.75 * past
        torch.testing.assert_close(after[entry].double().flatten(), update, atol=1e-5, rtol=0)
        update = update * min(1.0, 3.0 / float(update.norm()))
        parallel = (update @ x0_cond) / (x0_cond @ x0_cond) * x0_cond
        guided = x0_cond + (4.0 - 1) * (update - parallel + 0.25 * parallel)
        torch.testing.assert_close(ours[entry].double().flatten(), (x - guided) / level, atol=1e-4, rtol=0)


def test_apg_without_its_three_parts_is_classifier_free_guidance():
    latents, cond, uncond = velocities((2, 4, 6, 5), 3)
    ours, _ = adaptive_projected_guidance(
        cond, uncond, 4.0, latents=latents, sigma=torch.tensor([0.9, 0.1]), eta=1.0, average=torch.ones_like(cond)
    )
    torch.testing.assert_close(ours, classifier_free_guidance(cond, uncond, 4.0), atol=1e-4, rtol=1e-5)


def test_an_eta_of_0_moves_the_denoised_prediction_at_right_angles():
    latents, cond, uncond = velocities((2, 4, 6, 5), 3)
    sigma = torch.tensor([0.9, 0.4])
    level = sigma.view(-1, 1, 1, 1)
    ours, _ = adaptive_projected_guidance(cond, uncond, 8.0, latents=latents, sigma=sigma)
    before, after = latents - level * cond, latents - level * ours
    change = (after - before).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(change, before.flatten(1))
    assert cosine.abs().max() < 1e-5
    assert change.norm(dim=1).min() > 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm_threshold": -1.0}, "norm_threshold=-1.0: expected a finite number of at least 0"),
        ({"sigma": torch.ones(2)}, r"sigma is \(2,\); expected \(1,\), one level per entry"),
        ({"latents": torch.ones(1, 3)}, r"velocity_cond is \(1, 2\), latents is \(1, 3\)"),
        ({"average": torch.ones(1, 3)}, r"velocity_cond is \(1, 2\), average is \(1, 3\)"),
    ],
)
def test_bad_arguments_of_apg_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        adaptive_projected_guidance(COND, UNCOND, 4.0, **{"latents": COND, "sigma": torch.ones(1), **changed})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_steps", [0, 1, 2])
def test_zero_star_equals_diffusers(shape, zero_steps):
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=zero_steps)
    for index in range(4):
        cond, uncond = velocities(shape)
        guider.set_state(step=index, num_inference_steps=4, timestep=torch.tensor(0))
        ours = cfg_zero_star(cond, uncond, 5.0, index=index, zero_steps=zero_steps)
        torch.testing.assert_close(ours, guider.forward(cond, uncond).pred, atol=1e-5, rtol=1e-5)
        assert bool(ours.any()) is (index >= zero_steps)


def test_the_scale_of_zero_star_is_the_best_fit():
    cond, uncond = velocities((2, 4, 6, 5))
    fitted = cfg_zero_star(cond, uncond, 0.0, index=1)
    best = torch.linalg.lstsq(uncond.flatten(1)[..., None], cond.flatten(1)[..., None]).solution
    torch.testing.assert_close(fitted, best.view(-1, 1, 1, 1) * uncond, atol=1e-5, rtol=1e-5)


def test_bad_zero_steps_are_refused():
    with pytest.raises(ValueError, match="zero_steps=-1: expected an integer of at least 0"):
        cfg_zero_star(COND, UNCOND, 4.0, index=0, zero_steps=-1)


def test_predictions_of_0_give_0():
    """The last layer of many networks is zero before training, so that every prediction is 0."""
    zeros = torch.zeros(2, 4, 3, 3)
    apg, _ = adaptive_projected_guidance(zeros, zeros, 4.0, latents=zeros, sigma=torch.ones(2), norm_threshold=1.0)
    for guided in (rescaled_guidance(zeros, zeros, 4.0), cfg_zero_star(zeros, zeros, 4.0, index=1), apg):
        assert torch.equal(guided, zeros)


def test_inputs_stay_as_they_are():
    inputs = velocities((2, 4, 3, 3), 4)
    copies = [each.clone() for each in inputs]
    cond, uncond, latents, average = inputs
    classifier_free_guidance(cond, uncond, 4.0)
    rescaled_guidance(cond, uncond, 4.0)
    cfg_zero_star(cond, uncond, 4.0, index=1)
    adaptive_projected_guidance(
        cond, uncond, 4.0, latents=latents, sigma=torch.ones(2), norm_threshold=1.0, momentum=0.5, average=average
    )
    assert all(map(torch.equal, inputs, copies))
