"""Published LoRAs that plugins declare, with the defaults of calls that they set."""

from __future__ import annotations

import pytest

from diffsynth import _discovery, registry

PLUGIN = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import LoRASpec
DIFFSYNTH_API = 2
@hookimpl
def register_loras(register):
    register(LoRASpec(name="fast", pipeline="fake_one.pipeline:Pipeline", {fields}))
"""
GOOD = "defaults={'num_inference_steps': 4}, names=('*-fast-*.safetensors',)"


def test_a_declared_lora_is_in_the_catalog(site) -> None:
    site.install("one", PLUGIN.format(fields=GOOD))
    site.discover()
    (declared,) = [each for each in _discovery.catalog().loras if each.plugin == "one"]
    assert declared.spec.defaults == {"num_inference_steps": 4}
    assert registry.problems() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("defaults={'cfg_scale': 1.0}", "has neither files nor names"),
        ("defaults={}, names=('a',)", "has no defaults"),
        ("defaults={'cfg_scale': 1.0}, names='a'", "expected a tuple"),
        ("defaults={'cfg_scale': 1.0}, files=('a',)", "expected 'owner/repository:pattern'"),
        ("defaults={'cfg_scale': 1.0}, files=('package://a/b',)", "expected 'owner/repository:pattern'"),
    ],
)
def test_a_wrong_declaration_is_a_problem_of_the_plugin(site, fields, message) -> None:
    site.install("one", PLUGIN.format(fields=fields))
    site.discover()
    (problem,) = registry.problems()
    assert problem.plugin == "one"
    assert message in problem.error
