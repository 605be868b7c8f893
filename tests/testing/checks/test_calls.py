"""Tests of the checks of calls: a plugin whose calls are wrong in one respect fails that case and no other."""

import re
import sys

import pytest

from diffsynth.testing.checks import light
from diffsynth.testing.checks.calls import models_to_call
from diffsynth.testing.checks.check import Subject
from diffsynth.testing.suite import checks_of
from fake_plugins import Site, forget
from made_plugin import MODEL

VELOCITY = "return (latents - self.dit(latents, sigma, letters)) / sigma[:, None, None, None]"
ROLES = '    roles = {"dit": Role('
SEEDS = "seeds, dtype=dtype, device=device)"
SIGMAS = "z_image_sigmas(num_inference_steps, shift=1.0)"
IMAGES = 'return latents if output_type == "tensor" else tensor_to_images(latents)'
SPARKLE = """

@unit("letters")
def sparkle(*, letters: torch.Tensor, {argument}):
    return letters + 0 * int(sparkles + 0)
"""
MANAGED = "from diffsynth.core.vram.managed import managed"
CHECK = """    def check(self, **arguments):
        {body}
        return super().check(**arguments)

"""


def added_unit(argument):
    """Return edits that add a unit with the numeric argument `sparkles` to the pipeline's own units."""
    edited = SPARKLE.format(argument=argument)
    return [
        ("units.py", '\n\n@unit("output")', f'{edited}\n\n@unit("output")'),
        ("pipeline.py", "initial_latents)", "initial_latents, units.sparkle)"),
        ("pipeline.py", "from diffsynth import", "from diffsynth_zzz_made import units\nfrom diffsynth import"),
    ]


def checking(body):
    """Return an edit that gives the pipeline a `check()` that changes the arguments first."""
    return [("pipeline.py", ROLES, CHECK.format(body=body) + ROLES)]


def velocity(expression, before=""):
    """Return an edit that returns `expression` of the correct velocity `v`."""
    return [("pipeline.py", VELOCITY, f"{before}{VELOCITY.replace('return', 'v =')}\n        return {expression}")]


BROKEN = {
    "from_pretrained that raises": (
        [
            (
                "pipeline.py",
                ROLES,
                f"    @classmethod\n    def from_pretrained(cls, *a, **k):\n        raise OSError('x')\n\n{ROLES}",
            )
        ],
        "loads from tiny files",
        "x",
    ),
    "a velocity that raises": (
        [("pipeline.py", VELOCITY, "raise RuntimeError('the network broke')")],
        "can be called",
        "the network broke",
    ),
    "a velocity of two channels": (
        velocity("v[:, :2]"),
        "can be called",
        r"velocity\(\) returned a tensor \(1, 2, 32, 64\).*for latents \(1, 3, 32, 64\).*The call ended with Runtime",
    ),
    "a velocity of one column": (
        velocity("v[..., :1]"),
        "velocity() fits its latents",
        r"velocity\(\) returned a tensor \(1, 3, 32, 1\) of float32 for latents \(1, 3, 32, 64\); expected the latents",
    ),
    "a velocity of NaN": (velocity("v * float('nan')"), "can be called", "the latents hold NaN or infinity"),
    "a schedule that ends above 0": (
        [("units.py", SIGMAS, f"{SIGMAS}.clamp(min=0.1)")],
        "steps from noise to data",
        "ends at noise level 0.1",
    ),
    "a schedule of more steps": (
        [("units.py", SIGMAS, SIGMAS.replace("steps,", "steps + 1,"))],
        "steps from noise to data",
        "num_inference_steps=2 gave 3 steps",
    ),
    "a schedule that rises": (
        [("units.py", SIGMAS, f"{SIGMAS}[[1, 0, 2]]")],
        "can be called",
        r"sigmas is 0.5, 1.0, 0.0; expected strictly descending levels",
    ),
    "an output of the wrong size": (
        [("units.py", IMAGES, IMAGES.replace("latents", "latents.mT"))],
        "result is finite and of its size",
        "asked for height=32, width=64, got height=64, width=32",
    ),
    "an output that is not finite": (
        [("units.py", IMAGES, IMAGES.replace("return latents", "return latents / 0"))],
        "can be called",
        "the decoded values hold NaN or infinity",
    ),
    "images of the wrong size": (
        [("units.py", IMAGES, IMAGES.replace("(latents)", "(latents.mT)"))],
        "makes several results of another size",
        "asked for height=64, width=32, got height=32, width=64",
    ),
    "the first image only": (
        [("units.py", IMAGES, IMAGES.replace("(latents)", "(latents[:1])"))],
        "makes several results of another size",
        "a list of 1 for num_images=2; expected a list of 2",
    ),
    "noise that ignores the seed": (
        [("units.py", SEEDS, SEEDS.replace("seeds", "[7] * len(seeds)"))],
        "results depend on the seed alone",
        "two seeds give equal results, although initial_latents is declared random=True",
    ),
    "noise without a seed": (
        [("units.py", SEEDS, SEEDS.replace("seeds", "[None] * len(seeds)"))],
        "results depend on the seed alone",
        "two calls with one seed give different results",
    ),
    "noise that is not declared": (
        [("units.py", '"latents", random=True', '"latents"')],
        "results depend on the seed alone",
        "two seeds give different results; declare the unit that draws random=True",
    ),
    "a default that its schema refuses": (
        added_unit("sparkles: int = 0.5"),
        "defaults obey the schema",
        r"the default of sparkles does not obey its schema: sparkles=0\.5: expected an integer",
    ),
    "an unknown argument that is dropped": (
        checking("arguments.pop('no_such_argument', None)"),
        "refuses wrong arguments",
        "no_such_argument=1 is accepted and the loop begins; expected TypeError",
    ),
    "a value of a wrong type that is dropped": (
        checking("arguments.pop('height') if isinstance(arguments.get('height'), str) else None"),
        "refuses wrong arguments",
        "height='no such value' is accepted and the loop begins",
    ),
    "a default that is not neutral": (
        [*added_unit("sparkles: float = 1.0"), *checking("arguments['seed'] += 'sparkles' in arguments")],
        "defaults are neutral",
        "a call that passes every default gives another result",
    ),
    "a call that cannot be cancelled": (
        checking("arguments.pop('cancel', None)"),
        "can be cancelled",
        "the call returned a result; expected Cancelled",
    ),
    "a value that is kept between calls": (
        [
            ("units.py", "return initial_noise(", "KEPT[:] = [initial_noise("),
            ("units.py", SEEDS, f"{SEEDS}]\n    return KEPT[0]"),
            ("units.py", "round_size =", "KEPT = []\nround_size ="),
            ("pipeline.py", "import encode_prompt", "import KEPT, encode_prompt"),
            *velocity("v + KEPT[0]"),
        ],
        "can be called from two threads",
        "two calls at the same time give other results",
    ),
    "a value that only a real run has": (velocity("v * (1 + 0 * float(v.mean()))"), "can be planned", ""),
    "a plan that refuses its own limit": (
        [("pipeline.py", ROLES, "    def plan(self, *, vram_limit=None, **arguments):\n"
          "        assert vram_limit is None, 'no limit is small enough'\n"
          "        return super().plan(**arguments)\n\n" + ROLES)],
        "can be planned with the smallest limit",
        "no limit is small enough",
    ),
    "a network that knows where it is": (
        velocity("v * (1 + (managed(self.dit) is not None))", f"{MANAGED}\n        "),
        "result is the same offloaded",
        "under the policy 'cpu-offload' the result differs",
    ),
    "a copy of the network": (
        [
            ("pipeline.py", "from diffsynth import", "import copy\nCOPIES = {}\nfrom diffsynth import"),
            ("pipeline.py", VELOCITY, "key = latents.device.type\n        "
             "net = COPIES[key] if key in COPIES else COPIES.setdefault(key, copy.deepcopy(self.dit))\n        "
             + VELOCITY.replace("self.dit", "net")),
        ],
        "supports LoRAs",
        "a LoRA of dit changes nothing; does velocity\\(\\) call this network",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """The imports of light modules take a process of their own; `test_suite.py` tests that check."""
    monkeypatch.setattr(light, "heavy_imports", lambda modules: [])


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_call_fails_its_case_and_no_other(plugin, name):
    edits, expected, message = BROKEN[name]
    for path, old, new in edits:
        plugin.edit(path, old, new)
    failures = plugin.failures(calls=True)
    assert list(failures) == [f"{MODEL} {expected}"]
    assert re.search(message, str(*failures.values()))


def test_every_case_is_broken_by_one_of_these(plugin):
    assert {f"{MODEL} {case}" for _, case, _ in BROKEN.values()} == set(plugin.cases_of_calls())


def test_a_pipeline_without_random_numbers_gives_one_result(plugin):
    plugin.edit("units.py", '"latents", random=True', '"latents"')
    plugin.edit("units.py", SEEDS, SEEDS.replace("seeds", "[7] * len(seeds)"))
    assert plugin.failures(calls=True) == {}


def test_a_pipeline_without_a_loop_passes(plugin):
    """Its units write random images; they are the latents that the output unit reads."""
    plugin.edit("pipeline.py", "    loop = LoopArguments(num_inference_steps=12)\n", "")
    plugin.edit("pipeline.py", "(round_size, schedule, ", "(round_size, ")
    plugin.edit(
        "pipeline.py",
        "    def velocity(self, latents, sigma, *, letters):",
        "    def unused(self, latents, sigma, letters):",
    )
    assert plugin.failures(calls=True) == {}


def test_a_small_size_may_be_rounded_up(plugin):
    plugin.edit("units.py", "round_size = image_size(PATCH", "round_size = image_size(64")
    assert plugin.failures(calls=True) == {}


def test_a_small_size_may_be_refused(plugin):
    small = "if height * width < 64 * 128:\n        raise ValueError('too small')\n    "
    plugin.edit("units.py", "return initial_noise(", f"{small}return initial_noise(")
    assert plugin.failures(calls=True) == {}


def test_networks_are_called_once_by_all_checks(plugin):
    """A second model with the networks of the first has the cases of one call."""
    second = "    register(ModelSpec(**{**vars(first), 'name': 'zzz-made-2'}))\n"
    plugin.edit("plugin.py", "    register(\n        ModelSpec(", "    first = (\n        ModelSpec(")
    plugin.edit(
        "plugin.py",
        'prompt names",\n        )\n    )\n',
        f'prompt names",\n        )\n    )\n    register(first)\n{second}',
    )
    cases = plugin.cases_of_calls()
    assert (len(cases), len([case for case in cases if "zzz-made-2" in case])) == (22, 6)
    assert plugin.failures(calls=True) == {}


EXTENDING = """
from diffsynth import hookimpl
from diffsynth.spec import FeatureSpec
DIFFSYNTH_API = 2
@hookimpl
def register_features(register):
    register(FeatureSpec({where}feature="fake_glow.glow:GLOW"))
    register(FeatureSpec(pipeline="not_installed.pipeline:Pipeline", feature="fake_glow.glow:GLOW"))
"""

GLOW = """
from diffsynth import Feature, Phase, unit

@unit("latents", phase=Phase.LATENTS)
def brighten(*, {reads}, glow: float = 0.0):
    return latents

GLOW = Feature("glow", units=(brighten,))
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget(before)
    yield Site(tmp_path, monkeypatch)
    forget(before)


def glow(site, monkeypatch, where, reads="latents"):
    """Install a plugin that adds a feature to Z-Image; return the cases of the suite by name."""
    site.install("glow", EXTENDING.format(where=where))
    (site.folder / "fake_glow" / "glow.py").write_text(GLOW.format(reads=reads))
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "glow,zimage")
    site.discover()
    return {check.name: check for check in checks_of("fake-glow")}


Z_IMAGE = "diffsynth_zimage.pipeline:ZImagePipeline"


@pytest.mark.parametrize("where", [f'pipeline="{Z_IMAGE}", ', 'family="z-image", '])
def test_a_pipeline_that_a_plugin_extends_is_called_with_a_model_of_its_family(where, site, monkeypatch):
    cases = glow(site, monkeypatch, where)
    assert [one.spec.name for one in models_to_call(Subject.find("fake-glow"))] == ["z-image-turbo"]
    assert cases["model z-image-turbo loads from tiny files"].after == (f"additions to {Z_IMAGE} are there",)
    cases[f"additions to {Z_IMAGE} are there"].run()


@pytest.mark.parametrize("reads", ["latents", "latents, sparks"])
def test_a_feature_for_every_pipeline_fits_one(reads, site, monkeypatch):
    cases = glow(site, monkeypatch, "", reads)
    assert models_to_call(Subject.find("fake-glow")) == []
    check = cases["feature fake_glow.glow:GLOW fits a pipeline"]
    if reads == "latents":
        check.run()
    else:
        with pytest.raises(AssertionError, match=f"'glow' fits no installed pipeline: none of {Z_IMAGE} has what it"):
            check.run()


def test_a_feature_that_is_left_out_is_reported_with_the_reason(site, monkeypatch):
    cases = glow(site, monkeypatch, f'pipeline="{Z_IMAGE}", ', "latents, sparks")
    with pytest.raises(AssertionError, match="is left out of ZImagePipeline: .*reads 'sparks', which no earlier unit"):
        cases[f"additions to {Z_IMAGE} are there"].run()
