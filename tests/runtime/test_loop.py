"""The denoising loop: everything follows the index of the step, whatever the solver evaluates."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import Cancelled, NotFinite, Refused
from diffsynth.runtime.feature import StepContext
from diffsynth.runtime.guidance import Guidance, GuidanceStep
from diffsynth.runtime.solvers import find_solver, solver_names
from diffsynth.runtime.unit import unit
from tiny_z_image import tiny_z_image
from toy_pipeline import ToyNet, ToyPipeline, toy_pipeline

SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral")


def evaluations(solver: str, num_steps: int) -> list[int]:
    """Return the number of evaluations of each step; the last step of a solver with two has one."""
    each = find_solver(solver).evaluations_per_step
    return [each] * (num_steps - 1) + [1]


class Experts(ToyPipeline):
    """Two networks; records the step, the level and the branch of each evaluation."""

    seen: ClassVar[list[tuple[StepContext, float]]] = []

    def roles_at(self, step, values):
        return ("dit",) if step.sigma >= 0.8 else ("adapter",)

    def velocity(self, latents, sigma, *, colour, step):
        self.seen.append((step, float(sigma[0])))
        (role,) = self.roles_at(step, {})
        return self.components[role](latents, sigma, colour)


@pytest.fixture
def experts():
    Experts.seen.clear()
    nets = {role: ToyNet().requires_grad_(False) for role in ("dit", "adapter")}
    return Experts(nets, device="cpu", torch_dtype=torch.float32, policy="cpu-offload")


@pytest.mark.parametrize("solver", SOLVERS)
def test_latents_that_are_not_finite_name_their_step(solver):
    class Overflowing(ToyPipeline):
        def velocity(self, latents, sigma, *, colour):
            made = self.dit(latents, sigma, colour)
            return made * float("inf") if float(sigma[0]) < 0.8 else made

    pipe = toy_pipeline(Overflowing)
    seen = []
    with pytest.raises(NotFinite, match=r"after step [23] of 4 the latents hold NaN or infinity.*lower cfg_scale"):
        pipe("abc", seed=0, solver=solver, on_step=seen.append)
    assert 1 <= len(seen) <= 2  # steps before it are reported, it and later ones are not


def test_a_weight_that_is_not_finite_is_named():
    pipe = toy_pipeline()
    with torch.no_grad():
        pipe.dit.gain.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"after step 1 of 4.*dit has NaN or infinity in gain; load other weights"):
        pipe("abc", seed=0)


def test_every_solver_is_tested():
    assert set(SOLVERS) == set(solver_names())


@pytest.mark.parametrize("solver", SOLVERS)
def test_experts_switch_between_steps_and_never_within_one(solver, experts):
    steps, bars = [], []
    call = {"seed": 0, "num_inference_steps": 4, "solver": solver}
    bar = lambda items: bars.append(len(items)) or items  # noqa: E731
    result = experts("abc", **call, on_step=steps.append, progress_bar_cmd=bar)
    assert result == pytest.approx(0.3, abs=1e-4)
    assert bars == [4]
    assert [step.index for step in steps] == [0, 1, 2, 3]
    indices = [step.index for step, _ in experts.seen]
    assert [indices.count(index) for index in range(4)] == evaluations(solver, 4)
    assert {step.sigma for step, _ in experts.seen} == {step.sigma for step in steps}
    used = [experts.roles_at(step, {}) for step, _ in experts.seen]
    assert used == sorted(used, reverse=True)
    assert len(set(used)) == 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_call_is_cancelled_between_steps(solver, experts):
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        experts("abc", seed=0, solver=solver, cancel=cancel, on_step=lambda step: cancel.set())
    assert {step.index for step, _ in experts.seen} == {0}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_cache_compares_evaluations_of_one_kind(solver):
    """A threshold of 0 reuses nothing and changes no bit; a large one reuses each evaluation of the middle steps."""
    pipe = tiny_z_image()
    call = {"seed": 0, "num_inference_steps": 4, "cfg_scale": 2.0, "output_type": "latents", "solver": solver}
    call |= {"height": 32, "width": 32}
    plain = pipe("a red apple", **call)
    assert torch.equal(pipe("a red apple", **call, step_cache="first_block:threshold=0"), plain)
    reused = []
    cached = pipe(
        "a red apple", **call, step_cache="first_block:threshold=1000", on_step=lambda step: reused.append(step.reused)
    )
    assert cached.isfinite().all()
    counts = [2 * count for count in evaluations(solver, 4)]
    assert [len(names) for names in reused] == [0, *counts[1:]]


def test_the_state_of_an_extension_lives_for_one_call_and_branch(experts):
    for _ in range(2):
        experts.seen.clear()
        experts("abc", seed=0, cfg_scale=2.0, num_inference_steps=3)
        states: dict[str, set[int]] = {}
        for step, _ in experts.seen:
            assert step.networks is experts.components
            assert step.call_state.setdefault("steps", []) == list(range(step.index))
            step.call_state["steps"].append(step.index)
            states.setdefault(step.branch, set()).add(id(step.call_state))
        assert {branch: len(found) for branch, found in states.items()} == {"cond": 1, "uncond": 1}


def test_noise_of_a_solver_depends_on_the_seed_and_the_step():
    pipe = toy_pipeline()
    call = {"solver": "euler_ancestral", "output_type": "latents", "num_inference_steps": 3}
    alone = pipe("abc", seed=5, **call)
    assert torch.equal(pipe(["ab", "abc"], seed=[4, 5], **call)[1:], alone)
    assert torch.equal(pipe("abc", seed=5, **call), alone)


class Three(Guidance):
    """A guidance of three branches."""

    branches: ClassVar[tuple[str, ...]] = ("cond", "uncond", "empty")

    def combine(self, predictions: Mapping[str, Tensor], cfg_scale: float, step: GuidanceStep) -> Tensor:
        cond, uncond, empty = (predictions[name] for name in self.branches)
        return empty + cfg_scale * (cond - uncond) + 0.5 * (uncond - empty)


@unit("colour", branches={"uncond": {"prompt": "negative_prompt"}, "empty": {"prompt": "empty_prompt"}})
def encode_three(*, prompt: str | list[str] = ""):
    return torch.tensor([len(text) / 10 for text in prompt])


class ThreeBranches(ToyPipeline):
    """A pipeline whose prompt has three branches."""

    units = (*ToyPipeline.units[:2], encode_three, ToyPipeline.units[3])
    per_image = ("prompt", "negative_prompt", "empty_prompt")


def test_a_third_branch_runs():
    """The toy's network moves to a colour, so a guided call ends at the guided colour."""
    pipe = toy_pipeline(ThreeBranches)
    prompts = {"negative_prompt": "x" * 4, "empty_prompt": "x"}
    found = pipe("x" * 7, **prompts, seed=0, cfg_scale=2.0, guidance=Three())
    assert found == pytest.approx(0.1 + 2 * (0.7 - 0.4) + 0.5 * (0.4 - 0.1), abs=1e-4)
    assert pipe("x" * 7, **prompts, seed=0, cfg_scale=2.0) == pytest.approx(0.4 + 2 * 0.3, abs=1e-4)


def test_a_branch_that_no_unit_declares_is_refused():
    with pytest.raises(ValueError, match="needs the branch 'empty', for which no unit of ToyPipeline reads"):
        toy_pipeline()("abc", cfg_scale=2.0, guidance=Three())
    toy_pipeline()("abc", cfg_scale=1.0, guidance=Three())


@pytest.mark.parametrize("guidance", ["cfg", "rescaled", "apg", "cfg_zero_star", None])
def test_every_guidance_is_off_at_a_scale_of_one(guidance):
    pipe = toy_pipeline()
    plain = pipe("abc", seed=0, output_type="latents")
    assert torch.equal(pipe("abc", seed=0, output_type="latents", guidance=guidance), plain)
    guided = pipe("abc", seed=0, output_type="latents", guidance=guidance, cfg_scale=2.0)
    assert guided.isfinite().all()
    assert not torch.equal(guided, plain)


def test_unknown_names_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="'eular'.*did you mean 'euler'"):
        toy_pipeline().check(prompt="abc", solver="eular")
    with pytest.raises(ValueError, match="apgg"):
        toy_pipeline().check(prompt="abc", guidance="apgg")
    with pytest.raises(ValueError, match="zero_steps=4 leaves none of 4 steps"):
        toy_pipeline().check(prompt="abc", guidance="cfg_zero_star:zero_steps=4", cfg_scale=2.0)
    with pytest.raises(Refused, match="step_cache"):
        toy_pipeline().check(prompt="abc", step_cache="first_block:threshold=0.1")


class EpsilonNet(nn.Module):
    """Predicts the noise of an image of one colour, from latents of constant variance."""

    def forward(self, latents: Tensor, sigma: Tensor, colour: Tensor) -> Tensor:
        level, target = sigma.view(-1, 1, 1, 1), colour.view(-1, 1, 1, 1)
        scale = ((1 - level).square() + level.square()).sqrt()
        return (latents * scale - (1 - level) * target) / level


class EpsilonPipeline(ToyPipeline):
    """The toy pipeline with a network that predicts noise."""

    prediction = "epsilon"

    def velocity(self, latents, sigma, **conditions):
        return super(ToyPipeline, self).velocity(latents, sigma, **conditions)

    def predict(self, latents, sigma, *, colour):
        assert latents.dtype == self.dtype
        return self.dit(latents, sigma, colour)


def test_a_prediction_of_noise_is_adapted():
    pipe = EpsilonPipeline({"dit": EpsilonNet()}, device="cpu", torch_dtype=torch.float32)
    assert pipe("x" * 6, seed=0, denoising_strength=0.9) == pytest.approx(0.6, abs=1e-3)
