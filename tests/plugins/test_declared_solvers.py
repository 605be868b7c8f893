"""Tests of solvers that plugins declare: they are found by name, and a second one of a name is left out."""

import pytest

from diffsynth import registry
from diffsynth.errors import BrokenPlugin
from diffsynth.runtime.solvers import find_solver, load_solver, solver_names
from diffsynth.sampling.solver import euler

PLUGIN = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import SolverSpec
DIFFSYNTH_API = 2
@hookimpl
def register_solvers(register):
    register(SolverSpec(name="{name}", solver="fake_{plugin}.solver:{name}"{more}))
"""


def install(site, plugin, name, more=""):
    site.install(plugin, PLUGIN.format(plugin=plugin, name=name, more=more))
    (site.folder / f"fake_{plugin}" / "solver.py").write_text(f"def {name}(*arguments, **options):\n    return 3\n")


def test_a_declared_solver_is_found_by_name(site):
    install(site, "quick", "quick", more=", evaluations_per_step=3, uses_noise=True, paper='2401.00001'")
    site.discover()
    assert solver_names()[-1] == "quick"
    spec = find_solver("quick")
    assert (spec.evaluations_per_step, spec.uses_noise, spec.paper) == (3, True, "2401.00001")
    assert load_solver(spec)() == 3
    assert registry.problems() == []


def test_of_two_solvers_with_one_name_the_first_is_used_and_the_other_reported(site):
    install(site, "bad", "euler")
    install(site, "one", "quick")
    install(site, "two", "quick")
    site.discover()
    for _ in range(2):
        assert load_solver(find_solver("euler")) is euler
        assert find_solver("quick").solver == "fake_one.solver:quick"
    assert {(problem.plugin, problem.error.partition(".")[0]) for problem in registry.problems()} == {
        ("core", "solver 'euler' is also declared by bad (fake-bad)"),
        ("bad", "solver 'euler' is also declared by core (diffsynth-core)"),
        ("one", "solver 'quick' is also declared by two (fake-two)"),
        ("two", "solver 'quick' is also declared by one (fake-one)"),
    }


def test_two_solvers_with_one_name_raise_in_strict_mode(site, monkeypatch):
    install(site, "bad", "euler")
    monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "1")
    with pytest.raises(BrokenPlugin, match=r"bad \(fake-bad 1.0\): solver 'euler' is also declared by core"):
        site.discover()


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "True", "'two'"])
def test_an_impossible_number_of_evaluations_is_a_problem_of_the_plugin(site, count):
    install(site, "odd", "odd", more=f", evaluations_per_step={count}")
    site.discover()
    (problem,) = registry.problems()
    assert problem.plugin == "odd"
    assert problem.error.startswith("register_solvers: 'odd': evaluations_per_step")
    assert count in problem.error
    assert "expected an integer" in problem.error
    assert "odd" not in solver_names()
