"""Arguments without effect: logged once by the call, and left out of its record."""

from __future__ import annotations

import logging

import pytest

from diffsynth import provenance
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.unit import unit
from toy_pipeline import ToyPipeline, toy_pipeline


def messages(caplog):
    return [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"negative_prompt": "xy"}, ["negative_prompt has no effect: guidance is off (cfg_scale=1.0)"]),
        ({"negative_prompt": ["xy"], "guidance": "apg"}, ["negative_prompt has", "guidance has no effect"]),
        ({"negative_prompt": "xy", "cfg_scale": 2.0}, []),
        ({"negative_prompt": ""}, []),
        ({"height": 32}, []),
    ],
)
def test_a_call_says_once_what_has_no_effect(caplog, arguments, expected):
    with caplog.at_level(logging.WARNING):
        toy_pipeline()("abc", seed=0, **arguments)
    assert len(messages(caplog)) == len(expected)
    assert all(text.startswith(start) for text, start in zip(messages(caplog), expected, strict=True))


def test_a_record_leaves_it_out():
    pipe = toy_pipeline()
    off = provenance.record(pipe, {"prompt": "abc", "negative_prompt": "xy"})
    on = provenance.record(pipe, {"prompt": "abc", "negative_prompt": "xy", "cfg_scale": 2.0})
    assert off["arguments"] == {}
    assert on["arguments"] == {"negative_prompt": "xy"}


def test_arguments_of_a_unit_that_another_argument_turns_on():
    @unit("latents", only_with="edge")
    def shade(*, latents, edge: float | None = None, softness: float = 0.5):
        return latents

    class Shaded(ToyPipeline):
        units = (*ToyPipeline.units, shade)

    pipe = toy_pipeline(Shaded)
    assert pipe.arguments_without_effect(prompt="a", softness=0.7) == {"softness": "edge is not given"}
    assert pipe.arguments_without_effect(prompt="a", softness=0.7, edge=1.0) == {}


def test_arguments_of_an_output_that_is_not_made():
    @unit("output", only_with="scale")
    def enlarge(*, output, scale: int | None = None):
        return [each * scale for each in output]

    class Enlarged(ToyPipeline):
        output_units = (*ToyPipeline.output_units, enlarge)

    pipe = toy_pipeline(Enlarged)
    latents = {"prompt": "a", "scale": 2, "output_type": "latents"}
    assert pipe.arguments_without_effect(**latents) == {"scale": "output_type is 'latents'"}
    assert pipe.arguments_without_effect(**{**latents, "output_type": "pil"}) == {}


def test_what_all_units_that_a_value_reaches_ignore():
    """`image` reaches two units by `encoded`; it has an effect as soon as one of them does not ignore it."""

    @unit("encoded")
    def encode(*, image: str | None = None):
        return image

    @unit("latents", ignores=lambda values: {"encoded": "strength is 1"} if values["strength"] == 1 else {})
    def mix(*, latents, encoded, strength: float = 1.0):
        return latents

    @unit("mask", only_with="masked")
    def keep(*, encoded, masked: bool | None = None):
        return encoded

    class Mixed(ToyPipeline):
        units = (*ToyPipeline.units, encode, mix, keep)

    pipe, call = toy_pipeline(Mixed), {"prompt": "a", "image": "x"}
    assert pipe.arguments_without_effect(**call) == {"image": "strength is 1"}
    assert pipe.arguments_without_effect(**call, strength=0.5) == {}
    assert pipe.arguments_without_effect(**call, masked=True) == {}


def test_checks_see_all_values_of_a_call():
    seen = []

    def check(configs, values):
        seen.append(values)

    class Checked(ToyPipeline):
        features = (Feature("checked", check=check),)
        units = (
            *ToyPipeline.units,
            unit("latents", check=lambda values: seen.append(values))(lambda *, latents: latents),
        )

    toy_pipeline(Checked).check(prompt=["a", "b"], output_type="tensor", num_inference_steps=3, solver="heun")
    known = {"prompt": ["a", "b"], "output_type": "tensor", "num_inference_steps": 3, "solver": "heun", "batch_size": 2}
    assert len(seen) == 2
    assert all(values.items() >= known.items() for values in seen)
