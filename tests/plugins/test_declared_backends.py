from unittest import mock

import pytest
import torch

from diffsynth import registry
from diffsynth.core.attention import attention, available_backends
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.runtime import declared_backends
from toy_pipeline import toy_pipeline

PLUGIN = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import AttentionSpec
DIFFSYNTH_API = 2
@hookimpl
def register_attention(register):
    register(AttentionSpec(name="{name}", backend="fake_{plugin}.backend:BACKEND", priority=5))
"""

BACKEND = """
class Backend:
    def refuses(self, call):
        return "small heads" if call.q.shape[-1] < 8 else None

    def __call__(self, call):
        return call.v + 1

BACKEND = Backend()
"""


@pytest.fixture(autouse=True)
def _own_backends(monkeypatch):
    monkeypatch.setattr(declared_backends, "_in_use", {})
    with mock.patch.dict(BACKENDS):
        yield


def install(site, plugin, name, backend=BACKEND):
    site.install(plugin, PLUGIN.format(plugin=plugin, name=name))
    (site.folder / f"fake_{plugin}" / "backend.py").write_text(backend)


def test_a_declared_backend_is_used_by_name_and_by_priority(site):
    install(site, "quick", "quick")
    site.discover()
    toy_pipeline()
    toy_pipeline()
    assert registry.problems() == []
    assert available_backends()[0] == "quick"
    wide, narrow = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 4)
    assert torch.equal(attention(wide, wide, wide, backend="quick"), wide + 1)
    assert torch.equal(attention(wide, wide, wide), wide + 1)
    assert torch.equal(attention(narrow, narrow, narrow), attention(narrow, narrow, narrow, backend="sdpa"))


@pytest.mark.parametrize(
    ("name", "backend", "message"),
    [
        ("sdpa", BACKEND, "ValueError: attention backend 'sdpa' is already registered"),
        ("quick", "import no_such_kernel", "ModuleNotFoundError: No module named 'no_such_kernel'"),
        ("quick", "BACKEND = print", "TypeError: 'fake_bad.backend:BACKEND' is <built-in function print>; expected an"),
        ("quick", "raise SystemExit(1)", "ImportError: reference 'fake_bad.backend:BACKEND': module"),
    ],
)
def test_one_that_cannot_be_used_is_left_out(site, name, backend, message):
    install(site, "bad", name, backend)
    install(site, "good", "good")
    site.discover()
    toy_pipeline()
    assert available_backends()[0] == "good"
    (problem,) = registry.problems()
    assert problem.error.startswith(f"attention backend {name!r} is left out: {message}")
    assert problem.error.endswith("Without the plugin: pip uninstall fake-bad")
