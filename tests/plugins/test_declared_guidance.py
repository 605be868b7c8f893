"""Tests of guidances that plugins declare: found by name, refused with the plugin's name, reported once."""

import pytest

from diffsynth import registry
from diffsynth.errors import BrokenPlugin
from diffsynth.runtime.guidance import ClassifierFree, parse_guidance
from diffsynth.testing.suite import checks_of

PLUGIN = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import GuidanceSpec
DIFFSYNTH_API = 2
@hookimpl
def register_guidance(register):
    register(GuidanceSpec(name="{name}", guidance="fake_{plugin}.guidance:Half"))
"""

HALF = """
from dataclasses import dataclass
from diffsynth.runtime.guidance import Guidance

@dataclass(frozen=True, kw_only=True)
class Half(Guidance):
    strength: float
    branches = {branches}

    def combine(self, predictions, cfg_scale, step):
        return self.strength * predictions["cond"]
"""


def install(site, plugin, *, name="half", code=HALF, branches='("cond",)'):
    site.install(plugin, PLUGIN.format(plugin=plugin, name=name))
    (site.folder / f"fake_{plugin}" / "guidance.py").write_text(code.format(branches=branches))


def test_a_declared_guidance_is_found_by_its_name(site):
    install(site, "toy")
    site.discover()
    guidance = parse_guidance("half:strength=0.25")
    assert (type(guidance).__module__, guidance.strength, guidance.branches) == ("fake_toy.guidance", 0.25, ("cond",))
    with pytest.raises(ValueError, match="guidance='half': half needs strength, as in 'half:strength=0.1'"):
        parse_guidance("half")
    with pytest.raises(ValueError, match=r"'hal' is unknown; did you mean 'half'\?; expected one of apg, cfg, .*half"):
        parse_guidance("hal")
    assert registry.problems() == []


@pytest.mark.parametrize(
    ("code", "branches", "message"),
    [
        (HALF, "()", r"ValueError: Half.branches=\(\): expected a tuple of names, at least one"),
        (HALF, '("cond", "cond")', r"ValueError: Half.branches=\('cond', 'cond'\): expected each name once"),
        ("class Half: pass", "", "TypeError: 'fake_bad.guidance:Half' is .*; expected a subclass of Guidance"),
        ("import no_such_package", "", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise SystemExit(1)", "", "ImportError: reference 'fake_bad.guidance:Half': module"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_with_its_plugin(site, code, branches, message):
    install(site, "bad", code=code, branches=branches)
    site.discover()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"guidance='half': 'half' of plugin bad \(fake-bad 1.0\) cannot.*: {message}"
        ):
            parse_guidance("half")
    (problem,) = registry.problems()
    assert problem.error.startswith("guidance 'half' cannot be used: ")
    assert problem.error.endswith("Without the plugin: pip uninstall fake-bad")
    assert parse_guidance("cfg") == ClassifierFree()


def test_with_strict_plugins_it_is_an_error_of_the_plugin(site, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "1")
    install(site, "bad", branches="()")
    site.discover()
    with pytest.raises(BrokenPlugin, match=r"bad \(fake-bad 1.0\): guidance 'half' cannot be used"):
        parse_guidance("half:strength=1")


def test_no_plugin_takes_the_place_of_a_name_of_core(site):
    install(site, "aaa", name="cfg")
    site.discover()
    assert parse_guidance("cfg") == ClassifierFree()
    named = {problem.plugin: problem.error for problem in registry.problems()}
    assert "guidance 'cfg' is also declared by core (diffsynth-core)" in named["aaa"]


def test_a_name_with_a_colon_is_refused(site):
    install(site, "bad", name="half:strength")
    site.discover()
    (problem,) = registry.problems()
    assert "register_guidance: name 'half:strength': expected a plain name, without ':' or '/'" in problem.error


def test_an_unknown_name_shows_broken_plugins(site):
    site.install("broken", "raise RuntimeError('at import')")
    site.discover()
    with pytest.raises(ValueError, match=r"'half' is unknown; expected .*  1 plugin is broken: broken \(fake-broken"):
        parse_guidance("half")


@pytest.mark.parametrize(
    ("code", "branches", "message"),
    [
        (HALF, "()", r"half: guidance: Half.branches=\(\): expected a tuple"),
        ("Half = 1", "", "half: guidance: 'fake_bad.guidance:Half' is 1; expected a Guidance class"),
    ],
)
def test_conformance_finds_a_class_that_cannot_be_used(site, code, branches, message):
    install(site, "bad", code=code, branches=branches)
    site.discover()
    (check,) = [check for check in checks_of("fake-bad") if check.name == "references resolve"]
    with pytest.raises(AssertionError, match=message):
        check.run()
