"""Each `__all__` is sorted, complete, and names only what exists."""

import ast
import importlib

import pytest

import diffsynth
from source_tree import SOURCES, modules

LISTED = [name for name, file in modules().items() if "\n__all__ = " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", LISTED)
def test_sorted_and_there(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_the_public_list_of_diffsynth():
    assert "diffsynth" in LISTED
    tree = ast.parse(SOURCES["diffsynth"].read_text(encoding="utf-8"))
    for_type_checkers = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert for_type_checkers | {"__version__"} == set(diffsynth.__all__)
    assert set(diffsynth.__all__) <= set(dir(diffsynth))
    assert {"ModelConfig", "Pipeline", "hookimpl", "load", "registry", "unit"} <= set(diffsynth.__all__)


def test_star_import():
    names: dict = {}
    exec("from diffsynth import *", names)
    assert set(names) - {"__builtins__"} == set(diffsynth.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = diffsynth.Pipelin


def test_the_type_is_the_same_by_every_way():
    from diffsynth.runtime.pipeline import Pipeline
    from diffsynth.runtime.unit import unit

    assert diffsynth.Pipeline is Pipeline
    assert diffsynth.unit is unit
