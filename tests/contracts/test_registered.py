"""Registrations of our installed packages, beyond conformance: all packages load, and every model has a page."""

import ast
import inspect

import pytest

from diffsynth import _discovery, hookspecs
from diffsynth.runtime.composition import compose
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.spec import resolve
from source_tree import ROOT, SOURCES, modules

CATALOG = _discovery.catalog()
MODELS = [one.spec for one in CATALOG.models if one.distribution.startswith("diffsynth-")]
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "diffsynth_spec")]


def test_no_plugin_of_ours_is_broken():
    assert [str(problem) for problem in CATALOG.problems] == []


def test_all_six_packages_are_there():
    expected = {"diffsynth-core", *(name.replace("_", "-") for name in SOURCES if name != "diffsynth")}
    assert {plugin.distribution for plugin in CATALOG.plugins} >= expected


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_is_in_its_familys_page(model):
    page = ROOT / "docs" / "models" / f"{model.family}.md"
    assert page.is_file(), f"write docs/models/{model.family}.md"
    assert model.name in page.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("reference", sorted({model.pipeline for model in MODELS}))
def test_from_pretrained_of_a_pipeline_shows_policy_and_passes_it_on(reference, monkeypatch):
    """Editors and `help` show the signature; an override that drops `policy` would load weights without one."""
    cls, seen = resolve(reference), []

    def from_pretrained(self, *args, **kwargs):
        seen.append(kwargs["policy"])
        raise NotImplementedError

    parameter = inspect.signature(cls.from_pretrained).parameters["policy"]
    assert (parameter.default, parameter.kind) == (None, parameter.KEYWORD_ONLY)
    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(from_pretrained))
    with pytest.raises(NotImplementedError):
        cls.from_pretrained(policy="disk")
    assert seen == ["disk"]


@pytest.mark.parametrize("name", [name for name in HOOKS if not name.startswith("register_")])
def test_a_hook_is_called_somewhere_with_exactly_its_arguments(name):
    """Each is called by keyword, with the argument names of its specification."""
    expected = list(inspect.signature(getattr(hookspecs, name)).parameters)
    calls = [
        sorted(keyword.arg for keyword in node.keywords)
        for file in modules().values()
        if f'"{name}"' in (text := file.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and node.args and getattr(node.args[0], "value", None) == name
        if getattr(node.func, "attr", "") != "implements"  # asks whether a plugin has the hook
    ]
    assert calls
    assert calls == [sorted(expected)] * len(calls)


@pytest.mark.parametrize("reference", sorted({model.pipeline for model in MODELS}))
def test_the_fields_that_must_agree_are_in_the_configs(reference):
    made, declared = compose(resolve(reference)), {each.spec.name: each.spec for each in CATALOG.architectures}
    assert made.agreements, "text encoder, transformer and autoencoder have sizes in common"
    for path in (path for agreement in made.agreements for path in agreement.fields):
        role, _, field = path.partition(".")
        accepted = [declared[name] for name in made.roles[role].architectures if name in declared]
        configs = [resolve(architecture.config) for architecture in accepted]
        assert configs, path
        assert any(hasattr(config, field) for config in configs), path  # those without it are not compared
