"""Features that plugins add to the toy pipeline: one that does not fit is left out and reported with its plugin."""

import inspect

import pytest

from diffsynth import registry
from diffsynth.errors import BrokenPlugin
from toy_pipeline import ToyPipeline, toy_pipeline

PLUGIN = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import FeatureSpec
DIFFSYNTH_API = 2
@hookimpl
def register_features(register):
    register(FeatureSpec(feature="fake_{name}.feature:FEATURE", {target}))
"""

FEATURE = """
from diffsynth.runtime.feature import Condition, Feature
from diffsynth.runtime.role import Role
from diffsynth.runtime.unit import Phase, unit
{body}
FEATURE = {feature}
"""

DARKER = """
@unit("colour")
def darker(*, colour, darkness: float = 0.0):
    return colour - darkness
"""

MISFITS = {
    "another_type": (
        "@unit('extra')\ndef grow(*, height: str = 'tall'): return height",
        "unit 'grow' of plugin misfit (fake-misfit) declares argument 'height' as str = 'tall', unlike int = 32; "
        "it belongs to unit 'round_size'. Give it another name, or the same type and default",
    ),
    "another_default": (
        "@unit('extra')\ndef grow(*, denoising_strength: float = 0.5): return 0",
        "declares argument 'denoising_strength' as float = 0.5, unlike float = 1.0; it belongs to unit 'schedule'",
    ),
    "argument_of_the_loop": (
        "@unit('extra')\ndef grow(*, cfg_scale: str = 'big'): return cfg_scale",
        "unit 'grow' of plugin misfit (fake-misfit) declares 'cfg_scale', which every pipeline has. "
        "Read it without a default",
    ),
    "rewrites": (
        "@unit('latents')\ndef grow(): return 0",
        "rewrites 'latents' without reading it; it belongs to unit 'ini",
    ),
    "takes_an_argument_away": (
        "@unit('denoising_strength', phase=Phase.SHAPE)\ndef grow(): return 1.0",
        "writes 'denoising_strength' before its owner reads it",
    ),
    "reads_nothing_that_is_there": (
        "@unit('extra')\ndef grow(*, colours): return 0",
        "reads 'colours', which no earlier unit writes; did you mean 'colour'?",
    ),
    "a_name_that_is_there": ("@unit('extra')\ndef schedule(): return 0", "has the name of a unit that is there"),
    "a_role_that_is_not": ("@unit('extra')\ndef grow(vae): return 0", "uses role ['vae'], not one of ['dit'"),
    "import_error": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exits": (
        "raise SystemExit(3)",
        "module 'fake_misfit.feature' ends the program when it is imported (SystemExit: 3)",
    ),
}

WRONG = {
    "no_feature": ("lambda: 0", "is a function; expected a Feature"),
    "a_condition_that_velocity_does_not_take": (
        "Feature('misfit', units=(grow,), conditions={'extra': Condition()})",
        "feature 'misfit' of plugin misfit (fake-misfit) declares the condition 'extra', and velocity() of ToyPipeline",
    ),
    "a_role_that_differs": (
        "Feature('misfit', roles={'dit': Role(architectures=('other',))})",
        "feature 'misfit' of plugin misfit (fake-misfit) of ToyPipeline declares 'dit' in its roles as",
    ),
    "a_fact_of_no_role": ("Feature('misfit', facts={'extra': 'vea.factor'})", "fact 'extra' is 'vea.factor'"),
}


def install(site, name, body, *, feature="", target="pipeline='toy_pipeline:ToyPipeline'"):
    unit = body.partition("def ")[2].partition("(")[0]
    feature = feature or (f"Feature({name!r}, units=({unit},))" if unit else "None")
    site.install(name, PLUGIN.format(name=name, target=target))
    (site.folder / f"fake_{name}" / "feature.py").write_text(FEATURE.format(body=body, feature=feature))


@pytest.mark.parametrize("kind", MISFITS)
def test_a_misfit_is_left_out_and_the_pipeline_works(site, kind, caplog):
    body, message = MISFITS[kind]
    install(site, "misfit", body)
    install(site, "good", DARKER)
    site.discover()
    pipe = toy_pipeline()
    assert pipe("x" * 7, seed=0, darkness=0.2) == pytest.approx(0.5, abs=1e-5)

    (problem,) = registry.problems()
    assert (problem.plugin, problem.distribution, problem.version) == ("misfit", "fake-misfit", "1.0")
    assert message in problem.error
    assert "is left out of ToyPipeline: " in problem.error
    assert problem.error.endswith("Without the plugin: pip uninstall fake-misfit")
    assert "Traceback" in problem.traceback
    toy_pipeline()
    assert caplog.text.count("is left out of") == 1  # not once per pipeline
    assert len(registry.problems()) == 1


def test_its_arguments_are_unknown_and_the_error_says_why(site):
    install(site, "misfit", "@unit('latents')\ndef grow(*, growth: float = 1.0): return growth")
    site.discover()
    with pytest.raises(TypeError, match=r"unknown argument 'growth'.*1 plugin is broken: misfit \(fake-misfit 1\.0\)"):
        toy_pipeline()("abc", growth=2.0)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_feature_is_left_out(site, kind):
    feature, message = WRONG[kind]
    install(site, "misfit", "@unit('extra')\ndef grow(*, growth: float = 1.0): return growth", feature=feature)
    site.discover()
    toy_pipeline()
    (problem,) = registry.problems()
    assert message in problem.error


def test_a_feature_of_an_unfitting_phase_is_left_out(site):
    """The colour is written in a later phase than the one in which the unit would run."""
    install(site, "misfit", "@unit('colour', phase=Phase.SHAPE)\ndef grow(*, colour): return colour")
    site.discover()
    toy_pipeline()
    (problem,) = registry.problems()
    assert "reads 'colour', which no earlier unit writes" in problem.error


def test_a_feature_for_every_pipeline_is_added_where_it_fits(site):
    install(site, "good", DARKER, target="")
    install(site, "picky", "@unit('extra')\ndef grow(*, no_such_value): return 0", target="")
    site.discover()
    assert toy_pipeline()("x" * 7, seed=0, darkness=0.2) == pytest.approx(0.5, abs=1e-5)
    assert registry.problems() == []


def test_a_feature_of_a_family_is_added_to_its_pipelines(site):
    install(site, "good", DARKER, target="family='grey'")
    module = site.folder / "fake_good" / "plugin.py"
    module.write_text(
        module.read_text()
        + "from diffsynth.spec import ModelSpec\n"
        + "@hookimpl\ndef register_models(register):\n"
        + "    register(ModelSpec(name='grey-1', family='grey', task='text-to-image', components={},"
        + " pipeline='toy_pipeline:ToyPipeline'))\n"
    )
    site.discover()
    assert toy_pipeline()("x" * 7, seed=0, darkness=0.2) == pytest.approx(0.5, abs=1e-5)


def test_a_spec_names_a_pipeline_or_a_family(site):
    install(site, "both", DARKER, target="pipeline='toy_pipeline:ToyPipeline', family='grey'")
    site.discover()
    (problem,) = registry.problems()
    assert "names a pipeline and a family; expected one of them, or none" in problem.error


def test_two_plugins_that_clash_name_each_other(site):
    for name, default in (("alpha", 0.0), ("beta", 1.0)):
        body = f"@unit('{name}')\ndef {name}_step(*, softness: float = {default}): return softness"
        install(site, name, body)
    site.discover()
    pipe = toy_pipeline()
    assert inspect.signature(pipe).parameters["softness"].default == 0.0
    (problem,) = registry.problems()
    assert problem.plugin == "beta"
    assert "unit 'beta_step' of plugin beta (fake-beta) declares argument 'softness'" in problem.error
    assert "it belongs to unit 'alpha_step' of plugin alpha (fake-alpha)" in problem.error


def test_one_may_build_on_another_whatever_their_names(site):
    install(site, "alpha", "@unit('colour')\ndef halve(*, colour, shade): return colour * shade")
    install(site, "beta", "@unit('shade')\ndef shading(*, shade_level: float = 0.5): return shade_level")
    site.discover()
    assert toy_pipeline()("x" * 8, seed=0, shade_level=0.25) == pytest.approx(0.2, abs=1e-5)
    assert registry.problems() == []


def test_strict_mode_raises(site, monkeypatch):
    install(site, "misfit", "@unit('latents')\ndef grow(): return 0")
    site.discover()
    monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "1")
    with pytest.raises(
        BrokenPlugin, match=r"misfit \(fake-misfit 1\.0\): feature 'fake_misfit\.feature:FEATURE' is left out"
    ):
        toy_pipeline()


def test_the_class_itself_is_untouched(site):
    install(site, "good", DARKER)
    site.discover()
    assert "darkness" not in inspect.signature(ToyPipeline.__call__).parameters
    assert "darkness" in ToyPipeline.call_signature().parameters


def test_what_an_added_unit_raises_names_its_plugin(site):
    install(site, "late", "@unit('extra')\ndef fail(*, colour): raise RuntimeError('in the unit')")
    site.discover()
    with pytest.raises(RuntimeError, match="in the unit") as caught:
        toy_pipeline()("abc")
    assert caught.value.__notes__ == ["raised by unit 'fail' of plugin late (fake-late)"]
