"""What our installed packages register: references resolve, layouts are what they say, pages exist."""

import ast
import gzip
import importlib.resources
import inspect
import json

import pytest

from diffsynth import _discovery, hookspecs
from diffsynth._spec_checks import references
from diffsynth.core.loader import header
from diffsynth.spec import resolve
from source_tree import ROOT, SOURCES, modules

CATALOG = _discovery.catalog()
FACTS = {
    f"{kind}-{getattr(declared.spec, 'name', number)}": declared.spec
    for kind in _discovery.KINDS
    for number, declared in enumerate(getattr(CATALOG, kind))
    if declared.distribution.startswith("diffsynth-")
}
LAYOUTS = {one.spec.name: one.spec for one in CATALOG.checkpoints if one.spec.layout}
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "diffsynth_spec")]


def test_no_plugin_of_ours_is_broken():
    assert [str(problem) for problem in CATALOG.problems] == []


def test_all_six_packages_are_there():
    expected = {"diffsynth-core", *(name.replace("_", "-") for name in SOURCES if name != "diffsynth")}
    assert {plugin.distribution for plugin in CATALOG.plugins} >= expected


@pytest.mark.parametrize("name", FACTS)
def test_references_resolve(name):
    for reference in references(FACTS[name]):
        assert resolve(reference) is not None


@pytest.mark.parametrize("name", [name for name in FACTS if name.startswith("models-")])
def test_a_model_fits_its_pipeline(name):
    """Its components and processors are roles, and its defaults are arguments of the class."""
    spec = FACTS[name]
    pipeline = resolve(spec.pipeline)
    assert {*spec.components, *spec.processors} <= set(pipeline.roles)
    assert set(spec.defaults) <= set(inspect.signature(pipeline.__call__).parameters)
    assert (ROOT / "docs" / "models" / f"{spec.family}.md").is_file(), f"write docs/models/{spec.family}.md"
    assert spec.name in (ROOT / "docs" / "models" / f"{spec.family}.md").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("name", [name for name in FACTS if name.startswith("checkpoints-")])
def test_a_checkpoint_has_its_architecture(name):
    assert FACTS[name].architecture in {declared.spec.name for declared in CATALOG.architectures}


@pytest.mark.parametrize("name", LAYOUTS)
def test_signature_of_every_layout(name):
    package, _, path = LAYOUTS[name].layout.partition(":")
    data = json.loads(gzip.decompress(importlib.resources.files(package).joinpath(path).read_bytes()))
    shapes = {key: tuple(shape) for key, shape in data["tensors"].items()}
    assert header.signature(shapes) == LAYOUTS[name].signature


@pytest.mark.parametrize("name", [name for name in HOOKS if not name.startswith("register_")])
def test_a_hook_is_called_somewhere_with_exactly_its_arguments(name):
    """Each is called by keyword, so that the argument names of its specification are a promise kept."""
    expected = list(inspect.signature(getattr(hookspecs, name)).parameters)
    calls = [
        sorted(keyword.arg for keyword in node.keywords)
        for file in modules().values()
        if f'"{name}"' in (text := file.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and node.args and getattr(node.args[0], "value", None) == name
    ]
    assert calls
    assert calls == [sorted(expected)] * len(calls)
