"""A plugin for tests of the conformance suite."""

import sys
from unittest import mock

import pytest

from diffsynth import _discovery
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.runtime import declared_backends
from made_plugin import NAME, PACKAGE, Plugin


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    doors = sys.modules.pop("diffsynth.pipelines", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", NAME)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(declared_backends, "_in_use", {})
    with mock.patch.dict(BACKENDS):
        yield Plugin(tmp_path)
    for name in [name for name in sys.modules if name.startswith((PACKAGE, "diffsynth.pipelines"))]:
        del sys.modules[name]
    if doors is not None:
        sys.modules["diffsynth.pipelines"] = doors
    _discovery._discovered = None
