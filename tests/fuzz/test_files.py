"""Damaged and hostile checkpoint files: each loads, or ends soon in an error of ours that names it."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damaged_files import CORPUS, edits, file_bytes, outcome, valid

fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def test_the_file_that_is_changed_is_whole(tmp_path):
    entries, data = valid()
    file = tmp_path / "x.safetensors"
    file.write_bytes(file_bytes(entries, data))
    assert outcome(file) == ("accepted", "")


@pytest.mark.parametrize("name", CORPUS)
def test_files_that_once_failed(tmp_path, name):
    suffix, make, message = CORPUS[name]
    file = tmp_path / f"x{suffix}"
    file.write_bytes(make())
    verdict, text = outcome(file)
    assert verdict == "clear" or (verdict == "accepted" and not message)
    assert re.search(message, text), text


@settings(fuzz, max_examples=60)
@given(content=edits())
def test_changed_headers(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    assert outcome(file)[0] in ("clear", "accepted")


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_changed_pickles(tmp_path, data):
    name = data.draw(st.sampled_from(["a pickle that holds itself", "a pickle nested 100 deep"]))
    content = bytearray(CORPUS[name][1]())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    assert outcome(file)[0] in ("clear", "accepted")
