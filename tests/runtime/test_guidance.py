"""Tests of the settings of guidance: text form, defaults, and what each class computes from a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from diffsynth import _discovery
from diffsynth.runtime.guidance import (
    AdaptiveProjected,
    ClassifierFree,
    Guidance,
    GuidanceArgument,
    GuidanceStep,
    RescaledClassifierFree,
    ZeroStar,
    parse_guidance,
)
from diffsynth.runtime.schema.annotations import schema_of
from diffsynth.sampling.guidance import (
    adaptive_projected_guidance,
    cfg_zero_star,
    classifier_free_guidance,
    rescaled_guidance,
)

SHAPE = (2, 4, 3, 3)
CORE = ("cfg", "rescaled", "apg", "cfg_zero_star")


def step(index: int = 1, *, state: dict[str, Any] | None = None, first: bool = True, seed: int = 0) -> GuidanceStep:
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + seed))
    return GuidanceStep(latents, torch.full(SHAPE[:1], 0.5), index, 10, first, {} if state is None else state)


def predictions(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {branch: torch.randn(SHAPE, generator=generator) for branch in ("cond", "uncond")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ClassifierFree()),
        ("cfg", ClassifierFree()),
        ("rescaled", RescaledClassifierFree(rescale=0.7)),
        ("rescaled:rescale=0.2", RescaledClassifierFree(rescale=0.2)),
        ("apg", AdaptiveProjected(eta=0.0, momentum=-0.5, norm_threshold=0.0)),
        ("apg:eta=0.5,momentum=-0.75", AdaptiveProjected(eta=0.5, momentum=-0.75)),
        ("apg:norm_threshold=15", AdaptiveProjected(norm_threshold=15)),
        ("cfg_zero_star", ZeroStar(zero_steps=1)),
        ("cfg_zero_star:zero_steps=2", ZeroStar(zero_steps=2)),
        (AdaptiveProjected(eta=0.1), AdaptiveProjected(eta=0.1)),
    ],
)
def test_text_form(text, expected):
    assert parse_guidance(text) == expected


def test_core_declares_four():
    declared = [one for one in _discovery.catalog().guidance if one.plugin == "core"]
    assert tuple(one.spec.name for one in declared) == CORE
    assert all(one.spec.paper.startswith("arXiv:") for one in declared)
    assert all(one.spec.paper in type(parse_guidance(one.spec.name)).__doc__ for one in declared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apgg", r"guidance='apgg': 'apgg' is unknown; did you mean 'apg'\?; expected one of apg, cfg, cfg_zero_star"),
        ("", "guidance='': '' is unknown; expected one of"),
        ("apg:etta=1", r"'etta=1'; did you mean 'eta'\?; expected setting=value with one of eta, momentum"),
        ("apg:eta", "guidance='apg:eta': 'eta'"),
        ("cfg:eta=1", "guidance='cfg:eta=1': 'eta=1'; expected no settings"),
        ("apg:eta=high", "eta='high': expected a finite number"),
        ("rescaled:rescale=2", "rescale=2: expected a number from 0 to 1"),
        ("cfg_zero_star:zero_steps=1.5", "zero_steps=1.5: expected an integer of at least 0"),
    ],
)
def test_a_bad_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_guidance(text)


@pytest.mark.parametrize("value", [1.0, ClassifierFree, {"eta": 1}])
def test_another_type_is_refused(value):
    with pytest.raises(TypeError, match="guidance=.*: expected a Guidance, a text such as 'apg:eta=0.5', or None"):
        parse_guidance(value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RescaledClassifierFree, {"rescale": -0.1}, "rescale=-0.1"),
        (RescaledClassifierFree, {"rescale": True}, "rescale=True: expected a number from 0 to 1"),
        (AdaptiveProjected, {"eta": math.inf}, "eta=inf: expected a finite number"),
        (AdaptiveProjected, {"momentum": -1}, "momentum=-1: expected a number between -1 and 1"),
        (AdaptiveProjected, {"norm_threshold": -2.0}, "norm_threshold=-2.0: expected a finite number of at least 0"),
        (ZeroStar, {"zero_steps": -1}, "zero_steps=-1"),
        (ZeroStar, {"zero_steps": True}, "zero_steps=True"),
    ],
)
def test_a_setting_out_of_range_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("name", CORE)
def test_a_scale_of_1_is_off(name):
    guidance = parse_guidance(name)
    assert guidance.branches == ("cond", "uncond")
    assert guidance.is_off(1)
    assert guidance.is_off(1.0)
    assert not guidance.is_off(4.0)
    assert not guidance.is_off(0.0)


def test_each_computes_its_function():
    given, now = predictions(), step()
    cond, uncond = given["cond"], given["uncond"]
    apg, _ = adaptive_projected_guidance(
        cond, uncond, 4.0, latents=now.latents, sigma=now.sigma, eta=0.25, norm_threshold=2.0
    )
    expected = {
        ClassifierFree(): classifier_free_guidance(cond, uncond, 4.0),
        RescaledClassifierFree(rescale=0.3): rescaled_guidance(cond, uncond, 4.0, guidance_rescale=0.3),
        AdaptiveProjected(eta=0.25, norm_threshold=2.0): apg,
        ZeroStar(): cfg_zero_star(cond, uncond, 4.0, index=1),
        ZeroStar(zero_steps=2): torch.zeros(SHAPE),
    }
    for guidance, velocity in expected.items():
        assert torch.equal(guidance.combine(given, 4.0, step()), velocity)
        assert velocity.dtype == torch.float32


def test_latents_in_bf16_do_not_lower_the_dtype():
    now = step()
    lowered = GuidanceStep(now.latents.bfloat16(), now.sigma, 0, 10, True, {})
    assert AdaptiveProjected().combine(predictions(), 4.0, lowered).dtype == torch.float32


def test_momentum_adds_the_average_of_earlier_steps():
    guidance, state, average = AdaptiveProjected(momentum=-0.5), {}, None
    for index in range(3):
        now, given = step(index, state=state, seed=index), predictions(index)
        expected, average = adaptive_projected_guidance(
            given["cond"],
            given["uncond"],
            4.0,
            latents=now.latents,
            sigma=now.sigma,
            momentum=-0.5,
            average=average,
        )
        assert torch.equal(guidance.combine(given, 4.0, now), expected)


def test_momentum_advances_once_per_step():
    """A solver of second order evaluates the velocity twice per step. The second evaluation adds the same average as
    the first one, and leaves that of the next step alone.
    """
    guidance = AdaptiveProjected(momentum=-0.5)
    once, twice = {}, {}
    for index in range(3):
        given = predictions(index)
        first = guidance.combine(given, 4.0, step(index, state=once))
        assert torch.equal(guidance.combine(given, 4.0, step(index, state=twice)), first)
        assert torch.equal(guidance.combine(given, 4.0, step(index, state=twice, first=False)), first)
        guidance.combine(predictions(50 + index), 4.0, step(index, state=twice, first=False))


def test_without_momentum_nothing_is_kept():
    state: dict[str, Any] = {}
    AdaptiveProjected(momentum=0).combine(predictions(), 4.0, step(state=state))
    assert not any(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ((), r"Bad.branches=\(\): expected a tuple of names, at least one"),
        (("cond", ""), "expected a tuple of names"),
        ("cond", "Bad.branches='cond': expected a tuple of names"),
        (("cond", "cond"), r"Bad.branches=\('cond', 'cond'\): expected each name once"),
    ],
)
def test_bad_branches_are_refused_when_the_class_is_defined(branches, message):
    with pytest.raises(ValueError, match=message):
        type("Bad", (Guidance,), {"branches": branches})


def test_the_base_class_has_no_instances():
    with pytest.raises(TypeError, match="abstract"):
        Guidance()


def test_a_subclass_needs_no_declaration():
    @dataclass(frozen=True, kw_only=True)
    class Mean(Guidance):
        """The mean of three branches."""

        branches = ("cond", "uncond", "style")

        def combine(self, predictions, cfg_scale, step):
            return torch.stack([predictions[name] for name in self.branches]).mean(0)

    assert parse_guidance(Mean()) == Mean()


def test_json_takes_the_text_form():
    found = schema_of(GuidanceArgument)
    assert found["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert found["x-diffsynth-host-types"] == ["Guidance"]
