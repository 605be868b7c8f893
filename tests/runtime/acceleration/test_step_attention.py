"""The attention backend of each step of a tiny Z-Image, recorded by the backends themselves."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from diffsynth.core.attention import attention, register_backend, use_attention
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.errors import Refused
from diffsynth.runtime.acceleration import StepAttention, parse_step_attention
from tiny_z_image import SMALL, tiny_z_image

CALL = {"prompt": "a cat", "num_inference_steps": 5, "cfg_scale": 2.0, **SMALL}
BRANCHES = ("cond", "uncond")


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image()


class Recording:
    """The reference backend, which records the step and the branch that it served."""

    def __init__(self, name: str, served: list, now: ContextVar) -> None:
        self.name, self.served, self.now = name, served, now

    def refuses(self, call):
        return None if call.q.dtype == torch.float32 else f"dtype {call.q.dtype} is not fp32"

    def __call__(self, call):
        self.served.append((self.now.get(), self.name))
        return NaiveAttention()(call)


@pytest.fixture
def served(monkeypatch, pipe):
    """(step and branch, backend) of every call; None stands for calls outside the loop."""
    with mock.patch.dict(BACKENDS):
        now: ContextVar = ContextVar("now", default=None)
        served: list = []
        for name in ("quick", "exact"):
            register_backend(name, Recording(name, served, now), priority=1000 if name == "exact" else -1000)
        velocity, calls = type(pipe).velocity, []

        def recorded(self, latents, sigma, **conditions):
            token = now.set((len(calls) // 2, BRANCHES[len(calls) % 2]))
            calls.append(float(sigma[0]))
            try:
                return velocity(self, latents, sigma, **conditions)
            finally:
                now.reset(token)

        recorded.__signature__ = inspect.signature(velocity)
        monkeypatch.setattr(type(pipe), "velocity", recorded)
        yield served


def by_step(served) -> dict:
    found: dict = {}
    for at, name in served:
        found.setdefault(at, set()).add(name)
    return {at: names.pop() if len(names) == 1 else names for at, names in found.items()}


def test_the_first_and_last_steps_are_exact_in_both_branches(pipe, served) -> None:
    pipe(**CALL, attention=StepAttention("quick", first=2, last=1, otherwise="exact"))
    found = by_step(served)
    expected = ["exact", "exact", "quick", "quick", "exact"]
    assert {(step, branch): found[step, branch] for step in range(5) for branch in BRANCHES} == {
        (step, branch): name for step, name in enumerate(expected) for branch in BRANCHES
    }


def test_what_stands_outside_the_loop_is_not_concerned(pipe, served) -> None:
    """The text encoder keeps `auto`, which takes the exact one here; and afterwards nothing is chosen any more."""
    pipe(**CALL, attention="quick")
    found = by_step(served)
    assert {name for at, name in found.items() if at is not None} == {"quick"}
    assert found[None] == "exact"
    served.clear()
    attention(*[torch.randn(1, 3, 1, 8)] * 3)
    assert [name for _, name in served] == ["exact"]


def test_auto_serves_the_others_unless_told(pipe, served) -> None:
    pipe(**CALL, attention="quick:first=1,last=1")
    found = by_step(served)
    assert [found[step, "cond"] for step in range(5)] == ["exact", "quick", "quick", "quick", "exact"]


def test_more_exact_steps_than_there_are(pipe, served) -> None:
    pipe(**CALL, attention="quick:first=3,last=3")
    assert {name for at, name in by_step(served).items() if at} == {"exact"}


def test_a_choice_for_a_module_comes_first_and_one_around_the_call_after(pipe, served) -> None:
    with use_attention("exact"):
        pipe(**CALL, attention="quick")
    assert {name for at, name in by_step(served).items() if at} == {"quick"}
    served.clear()
    with use_attention("exact", module=pipe.dit):
        pipe(**CALL, attention="quick")
    assert {name for at, name in by_step(served).items() if at} == {"exact"}


def test_a_backend_that_cannot_serve_the_pipeline_is_refused_before_the_first_step(pipe, served, monkeypatch) -> None:
    with pytest.raises(Refused, match="'triton_int8' cannot serve this pipeline: dtype torch.float32 is neither"):
        pipe(**CALL, attention=StepAttention("triton_int8", first=2))
    with pytest.raises(Refused, match="otherwise='triton_int8'"):
        pipe.check(**CALL, attention="quick:otherwise=triton_int8,last=1")
    monkeypatch.setattr(pipe, "dtype", torch.float16)
    with pytest.raises(Refused, match="float16 is not fp32"):
        pipe.check(**CALL, attention="quick")
    assert served == []


def test_a_plan_of_the_call_asks_no_device(pipe) -> None:
    assert pipe.plan(**CALL, attention="triton_int8:first=1", device="cuda").stages


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("triton_int", "'triton_int' is unknown; did you mean 'triton_int8'"),
        ("naive:otherwise=sdap", "'sdap' is unknown; did you mean 'sdpa'"),
        ("naive:frist=2", "did you mean 'first'"),
        ("naive:first=-1", "first=-1: expected an integer of at least 0"),
        ("naive:last=two", "last='two': expected an integer"),
        ("naive:2", "expected setting=value with one of first, last, otherwise"),
    ],
)
def test_texts_that_say_nothing_useful(pipe, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.check(**CALL, attention=value)


def test_texts() -> None:
    assert parse_step_attention("naive") == StepAttention("naive")
    text = "triton_int8:first=2,last=1,otherwise=sdpa"
    assert parse_step_attention(text) == StepAttention("triton_int8", first=2, last=1, otherwise="sdpa")
    with pytest.raises(TypeError, match="expected a StepAttention"):
        parse_step_attention(2)


def test_the_command_line_knows_it() -> None:
    from diffsynth.cli.group import program

    line = ["generate", "z-image-turbo", "a cat", "-o", "x.png", "--set", "atention=naive"]
    result = CliRunner().invoke(program, line)
    assert result.exit_code != 0
    assert "did you mean 'attention'" in result.output
