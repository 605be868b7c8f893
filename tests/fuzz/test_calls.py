"""Wrong arguments of calls: each is refused by an error of ours, before the text encoder runs, or is taken.

`benchmarks/fuzz_calls.py` is the long form: every argument with every value.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call_fuzz import ONCE_FAULTY, FuzzedPipeline, pipelines, wrong_values

fuzzing = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", params=pipelines())
def fuzzed(request):
    return FuzzedPipeline(request.param)


def test_values_that_once_passed_are_refused_before_anything_is_encoded(fuzzed):
    for name in ONCE_FAULTY.keys() & set(fuzzed.arguments):
        for value in ONCE_FAULTY[name]:
            verdict = fuzzed.verdict({name: value})
            assert verdict.kind == "clear", str(verdict)


@fuzzing
@given(data=st.data())
def test_one_wrong_argument(fuzzed, data):
    name = data.draw(st.sampled_from(fuzzed.arguments))
    verdict = fuzzed.verdict({name: data.draw(st.sampled_from(wrong_values()))})
    assert not verdict.is_faulty, str(verdict)


@fuzzing
@given(data=st.data())
def test_several_wrong_arguments(fuzzed, data):
    names = data.draw(st.lists(st.sampled_from(fuzzed.arguments), min_size=2, max_size=4, unique=True))
    verdict = fuzzed.verdict({name: data.draw(st.sampled_from(wrong_values())) for name in names})
    assert not verdict.is_faulty, str(verdict)
