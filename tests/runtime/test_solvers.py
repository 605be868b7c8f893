"""Tests of solvers by name: core's are declared as they behave, unknown names and unusable functions are errors."""

from __future__ import annotations

import pytest
import torch

from diffsynth.runtime.solvers import find_solver, load_solver, solver_names
from diffsynth.sampling import solver as solvers
from diffsynth.sampling.schedule import z_image_sigmas
from diffsynth.spec import SolverSpec

CORE = ("euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral")


def test_the_solvers_of_core_come_first():
    assert solver_names()[: len(CORE)] == CORE


@pytest.mark.parametrize("name", CORE)
def test_a_solver_is_found_and_loaded_by_its_name(name):
    spec = find_solver(name)
    assert spec.name == name
    assert load_solver(spec) is getattr(solvers, name)


@pytest.mark.parametrize("name", CORE)
def test_a_declaration_says_how_its_solver_calls_network_and_noise(name):
    spec, levels, drawn = find_solver(name), [], []

    def velocity(latents, sigma):
        levels.append(sigma)
        return latents.sin()

    def noise(index):
        drawn.append(index)
        return torch.randn(1, 2)

    load_solver(spec)(velocity, torch.ones(1, 2), z_image_sigmas(5), noise=noise)
    assert len(levels) == 4 * spec.evaluations_per_step + 1, "a step to sigma 0 has one evaluation"
    assert bool(drawn) is spec.uses_noise


def test_an_unknown_name_is_an_error_with_the_nearest_spelling():
    with pytest.raises(
        ValueError,
        match=r"^solver 'dpm_2m' is unknown; did you mean 'dpmpp_2m'\?; expected one of euler, heun, dpmpp_2m, unipc",
    ):
        find_solver("dpm_2m")
    with pytest.raises(ValueError, match=r"^solver 'zzz' is unknown; expected one of euler, heun"):
        find_solver("zzz")


def test_a_name_that_is_no_text_is_an_error():
    with pytest.raises(TypeError, match=r"^solver=3: expected a name such as 'euler'"):
        find_solver(3)


def test_a_reference_to_something_else_than_a_function_is_an_error():
    with pytest.raises(TypeError, match=r"^solver 'round': 'math:pi' is 3.14\d+; expected a function"):
        load_solver(SolverSpec(name="round", solver="math:pi"))
    with pytest.raises(ImportError, match="module 'math' has no 'no_such_name'"):
        load_solver(SolverSpec(name="absent", solver="math:no_such_name"))
