"""Tests of the page on solvers: its blocks run, and its tables are what is declared."""

import inspect
import re
from pathlib import Path

import pytest

from diffsynth.runtime.solvers import find_solver
from diffsynth.sampling import solver as solvers
from diffsynth.sampling.solver import euler

PAGE = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
CORE = ["euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral"]


def rows(header):
    """Return the cells of each row of the table whose first header is `header`."""
    table, *_ = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(block):
    exec(block, {"__name__": "block", "pipe": lambda prompt, *, solver: find_solver(solver)})


def test_the_table_is_what_core_declares():
    listed = rows("name")
    assert [row[0] for row in listed] == [f"`{name}`" for name in CORE]
    for name, (_, _, _, evaluations, noise, paper) in zip(CORE, listed, strict=True):
        spec = find_solver(name)
        assert int(evaluations[0]) == spec.evaluations_per_step
        assert (noise == "yes", paper) == (spec.uses_noise, spec.paper)


def test_every_argument_is_explained_and_solvers_have_the_same():
    expected = list(inspect.signature(euler).parameters)
    assert [row[0] for row in rows("argument")] == [f"`{name}`" for name in expected]
    for name in CORE:
        assert list(inspect.signature(getattr(solvers, name)).parameters) == expected


def test_the_step_functions_are_those_of_the_module():
    there = [name for name in vars(solvers) if name.endswith("_step")]
    assert re.findall(r"`(\w+_step)`", PAGE.partition("## Steps and states")[2])[:5] == there
