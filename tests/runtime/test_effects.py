"""Arguments without effect: logged once by the call, and left out of its record."""

from __future__ import annotations

import logging

import pytest

from diffsynth import provenance
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
    assert on["arguments"] == {"negative_prompt": "xy", "cfg_scale": 2.0}


def test_arguments_of_a_unit_that_another_argument_turns_on():
    @unit("latents", only_with="edge")
    def shade(*, latents, edge: float | None = None, softness: float = 0.5):
        return latents

    class Shaded(ToyPipeline):
        units = (*ToyPipeline.units, shade)

    pipe = toy_pipeline(Shaded)
    assert pipe.arguments_without_effect(prompt="a", softness=0.7) == {"softness": "edge is not given"}
    assert pipe.arguments_without_effect(prompt="a", softness=0.7, edge=1.0) == {}
