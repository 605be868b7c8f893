"""The denoising loop: everything follows the index of the step, whatever the solver evaluates."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from diffsynth.errors import Cancelled, NotFinite, PipelineError, Refused
from diffsynth.runtime.feature import StepContext
from diffsynth.runtime.guidance import Guidance, GuidanceStep
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import Step
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


class Recording(ToyPipeline):
    """Records the latents and the velocity of the first evaluation of each step, and weak references to them."""

    first: ClassVar[dict[int, tuple[Tensor, float, Tensor]]] = {}
    made: ClassVar[list[weakref.ref[Tensor]]] = []

    def velocity(self, latents, sigma, *, colour, step):
        found = self.dit(latents, sigma, colour).sin()
        self.first.setdefault(step.index, (latents.clone(), float(sigma[0]), found.clone()))
        self.made.extend(map(weakref.ref, (latents, found)))
        return found


@pytest.fixture
def recording():
    Recording.first.clear()
    Recording.made.clear()
    return toy_pipeline(Recording)


def midpoint(velocity, latents, sigmas, *, noise=None, on_step=None, progress=iter):
    """Return the latents at `sigmas[-1]`: a plugin's solver, with two evaluations per step and latents in float64."""
    for index in progress(range(len(sigmas) - 1)):
        step = sigmas[index + 1] - sigmas[index]
        middle = latents.double() + velocity(latents, sigmas[index]) * step / 2
        latents = (latents + velocity(middle.float(), sigmas[index] + step / 2) * step).float()
        on_step(index, latents)
    return latents


@pytest.mark.parametrize("solver", [*SOLVERS, "midpoint"])
def test_x0_is_the_formula_at_the_first_evaluation_of_each_step(solver, recording, monkeypatch):
    if solver == "midpoint":
        monkeypatch.setattr("diffsynth.runtime.loop.load_solver", lambda spec: midpoint)
        solver = "euler"
    found = []
    recording("abc", seed=0, solver=solver, on_step=lambda step: found.append(step.x0))
    assert len(found) == 4
    for index, x0 in enumerate(found):
        latents, sigma, velocity = recording.first[index]
        assert x0.dtype == torch.float32
        assert torch.equal(x0, latents - torch.tensor(sigma) * velocity)


def test_x0_of_a_last_step_of_euler_is_the_result(recording):
    found = []
    result = recording("abc", seed=0, output_type="latents", on_step=lambda step: found.append(step.x0))
    assert torch.equal(found[-1], result)


def test_x0_of_a_guided_call_with_reused_steps():
    """Euler's step and x0 are on one line: x0 = x - sigma * (x_next - x) / (sigma_next - sigma)."""
    pipe, seen, before = tiny_z_image(), [], []
    call = {"height": 32, "width": 32, "num_inference_steps": 4, "cfg_scale": 2.0, "seed": 0, "output_type": "latents"}

    def on_step(step):
        if before:
            expected = before[-1] - step.sigma * (step.latents - before[-1]) / (step.sigma_next - step.sigma)
            assert_close(step.x0, expected, atol=1e-4, rtol=1e-4)
        seen.append((step.x0, step.reused))
        before.append(step.latents.clone())

    result = pipe("a red apple", **call, step_cache="first_block:threshold=1000", on_step=on_step)
    assert [len(reused) for _, reused in seen] == [0, 2, 2, 2]
    assert torch.equal(seen[-1][0], result)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_x0_of_a_network_that_predicts_something_else(prediction):
    """A network that knows the image: whatever it predicts of it, x0 is the image."""

    class Knowing(ToyPipeline):
        def predict(self, latents, sigma, *, colour):
            level = sigma.view(-1, 1, 1, 1)
            r = ((1 - level).square() + level.square()).sqrt()
            image = torch.full_like(latents, 0.3)
            noise = (latents * r - (1 - level) * image) / level
            made = {"x0": image, "epsilon": noise, "v": ((1 - level) * noise - level * image) / r}
            return made[self.prediction]

    Knowing.velocity = Pipeline.velocity
    Knowing.prediction = prediction
    found = []
    toy_pipeline(Knowing)("abc", seed=0, denoising_strength=0.9, on_step=lambda step: found.append(step.x0))
    for x0 in found:
        assert_close(x0, torch.full_like(x0, 0.3), atol=1e-4, rtol=0)


def test_a_kept_step_has_no_x0_and_keeps_no_tensor_of_its_evaluation(recording):
    steps = []
    recording("abc", seed=0, on_step=steps.append)
    assert len(recording.made) == 8
    results = {id(step.latents) for step in steps}
    assert all(made() is None or id(made()) in results for made in recording.made)
    with pytest.raises(PipelineError, match=r"^step.x0 can be read only while on_step runs"):
        _ = steps[0].x0
    with pytest.raises(PipelineError, match="made without the evaluation of a loop"):
        _ = Step(0, 1, 1.0, 0.0, torch.zeros(1)).x0


def test_a_solver_that_changes_tensors_in_place_has_no_x0(recording, monkeypatch):
    def in_place(velocity, latents, sigmas, *, noise=None, on_step=None, progress=iter):
        for index in progress(range(len(sigmas) - 1)):
            latents += velocity(latents, sigmas[index]) * (sigmas[index + 1] - sigmas[index])
            on_step(index, latents)
        return latents

    monkeypatch.setattr("diffsynth.runtime.loop.load_solver", lambda spec: in_place)
    recording("abc", seed=0, on_step=lambda step: None)
    with pytest.raises(PipelineError, match="the solver changed the latents or the velocity of the step in place"):
        recording("abc", seed=0, on_step=lambda step: step.x0)
