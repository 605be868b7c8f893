"""Writers that installed plugins declare, and clashes between them."""

import pytest

from diffsynth import registry
from diffsynth.runtime.writers import declared_writers, find_writer

PLUGIN = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import WriterSpec
DIFFSYNTH_API = 2
@hookimpl
def register_writers(register):
    register(WriterSpec(suffix="{suffix}", kind="lines", writer="fake_{plugin}.pipeline:ToyPipeline"))
"""


def install(site, plugin, suffix):
    site.install(plugin, PLUGIN.format(plugin=plugin, suffix=suffix))


def test_writers_of_plugins_are_added_to_those_of_core(site):
    install(site, "toy", ".lines")
    site.discover()
    assert registry.problems() == []
    own = {"/", ".gif", ".jpeg", ".jpg", ".mp4", ".png", ".safetensors", ".wav", ".webp"}
    assert list(declared_writers()) == sorted({".lines", *own})
    declared = find_writer("a.lines")
    assert (declared.plugin, declared.distribution, declared.spec.kind) == ("toy", "fake-toy", "lines")


def test_two_plugins_of_one_suffix_are_a_problem_that_names_both(site):
    install(site, "beta", ".lines")
    install(site, "alpha", ".Lines")
    site.discover()
    assert sorted(map(str, registry.problems())) == [
        f"{one} (fake-{one} 1.0): writer '.lines' is also declared by {other} (fake-{other}). "
        "Keep one of them: pip uninstall fake-alpha, or: pip uninstall fake-beta"
        for one, other in (("alpha", "beta"), ("beta", "alpha"))
    ]
    assert find_writer("a.lines").plugin == "alpha"


def test_no_plugin_replaces_a_writer_of_core(site):
    install(site, "toy", ".png")
    site.discover()
    assert sorted(problem.plugin for problem in registry.problems()) == ["core", "toy"]
    assert find_writer("a.png").plugin == "core"


def test_an_unknown_suffix_tells_of_broken_plugins(site):
    install(site, "toy", "lines")
    site.discover()
    with pytest.raises(ValueError, match="1 plugin is broken: toy .fake-toy 1.0.: register_writers: suffix 'lines'"):
        find_writer("a.lines")
