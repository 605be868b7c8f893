"""Test of the script that trains the example's weights; tests/packaging tests the package's wheel."""

import runpy
import sys

import pytest

from diffsynth.core.loader import header
from source_tree import ROOT

EXAMPLE = ROOT / "examples" / "third_party_plugin"


@pytest.fixture
def make_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    yield runpy.run_path(str(EXAMPLE / "make_weights.py"))
    for name in [name for name in sys.modules if name.split(".")[0] == "diffsynth_toy"]:
        del sys.modules[name]


def test_make_weights_writes_such_a_file_as_is_there(make_weights, tmp_path):
    made = tmp_path / "dit.safetensors"
    make_weights["main"](made, steps=3)
    (written, there) = (header.read([file]) for file in (made, EXAMPLE / "src" / "diffsynth_toy" / "dit.safetensors"))
    assert written.shapes == there.shapes
    assert {info.dtype for info in written.tensors.values()} == {info.dtype for info in there.tensors.values()}
    assert there.metadata.items() <= written.metadata.items()  # new files also say which versions wrote them
