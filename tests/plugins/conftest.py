import sys

import pytest

from fake_plugins import Site, forget


@pytest.fixture
def site(tmp_path, monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "")
    forget(before)  # what earlier tests discovered
    yield Site(tmp_path, monkeypatch)
    forget(before)
