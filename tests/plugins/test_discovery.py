import logging
import os
import threading

import pytest

from diffsynth import _discovery, registry
from diffsynth.errors import AmbiguousModel, BrokenPlugin, UnknownModel
from fake_plugins import good

OBSERVER = """
from diffsynth.hookspecs import hookimpl

DIFFSYNTH_API = 2
seen = []


@hookimpl
def step_done(step, sigma):
    {body}


@hookimpl
def resolve_source(source):
    {resolve}
"""


def observer(body="seen.append((step, sigma))", resolve="return None"):
    return OBSERVER.format(body=body, resolve=resolve)


def tell(step=0):
    _discovery.notify("step_done", pipeline=None, step=step, num_steps=4, sigma=0.5)


def test_the_allow_list_always_has_core_and_empty_is_nothing_else(site):
    assert [plugin.name for plugin in site.discover().plugins if plugin.name != "core"] == []
    assert site.discover().models == ()


def test_what_is_declared_carries_its_provider(site):
    site.install("toy", good("fake_toy", "toy-1"), version="2.3")
    (model,) = site.discover().models
    assert (model.plugin, model.distribution, model.version) == ("toy", "fake-toy", "2.3")
    record = registry.get("TOY-1")
    assert (record.plugin, record.distribution, record.version) == ("toy", "fake-toy", "2.3")


@pytest.mark.parametrize("backwards", [False, True])
def test_collisions_do_not_depend_on_order(site, monkeypatch, backwards):
    for name in ("alpha", "beta"):
        site.install(name, good(f"fake_{name}", "shared"))
    monkeypatch.setattr(os, "listdir", lambda path, listed=os.listdir: sorted(listed(path), reverse=backwards))
    site.discover()
    assert [record.exact_name for record in registry.list()] == ["alpha:shared", "beta:shared"]
    for bare in ("shared", "Owner/shared"):
        with pytest.raises(AmbiguousModel) as caught:
            registry.get(bare)
        assert str(caught.value) == (
            f"{bare!r} means 2 models. Ask for one of 'alpha:shared' (fake-alpha 1.0) or 'beta:shared' (fake-beta 1.0)"
        )
    assert registry.get("beta:shared").plugin == "beta"
    assert registry.get("ALPHA:owner/Shared").plugin == "alpha"


def test_refresh_finds_what_was_installed_meanwhile(site):
    site.discover()
    with pytest.raises(UnknownModel):
        registry.get("late")
    site.install("late", good("fake_late", "late"))
    registry.refresh()
    assert registry.get("late").plugin == "late"


def test_one_discovery_for_many_threads(site, monkeypatch):
    site.install("toy", good("fake_toy", "toy"))
    count, discover = [], _discovery._discover
    monkeypatch.setattr(_discovery, "_discover", lambda: (count.append(1), discover())[1])
    _discovery._discovered = None
    found = []
    threads = [threading.Thread(target=lambda: found.append(_discovery.catalog())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1
    assert all(catalog is found[0] for catalog in found)


def test_an_observer_that_raises_does_not_stop_the_others(site, caplog):
    site.install("bad", observer("raise RuntimeError('oops')"))
    site.install("good", observer())
    site.install("zealous", observer("raise SystemError"))
    site.discover()
    import fake_good.plugin

    with caplog.at_level(logging.ERROR):
        tell(0)
        tell(1)
    assert fake_good.plugin.seen == [(0, 0.5), (1, 0.5)]
    assert caplog.text.count("plugin 'bad' failed in step_done") == 1  # not once per step
    assert "plugin 'zealous' failed" in caplog.text
    assert "oops" in caplog.text


def test_an_observer_does_not_end_its_host(site, caplog):
    site.install("quitter", observer("raise SystemExit(3)"))
    site.discover()
    tell()
    assert "plugin 'quitter' failed in step_done" in caplog.text


def test_an_observer_that_raises_stops_a_strict_run(site, monkeypatch):
    site.install("bad", observer("raise RuntimeError('oops')"))
    site.discover()
    monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "true")
    with pytest.raises(BrokenPlugin, match="plugin 'bad' failed in step_done: RuntimeError: oops"):
        tell()


def test_the_first_answer_counts(site):
    site.install("none", observer())
    site.install("some", observer(resolve="return [source] if source.startswith('toy://') else None"))
    site.discover()
    assert _discovery.first("resolve_source", source="toy://x") == ["toy://x"]
    assert _discovery.first("resolve_source", source="other://x") is None


def test_an_answer_that_raises_names_its_plugin(site):
    site.install("bad", observer(resolve="raise OSError('disk')"))
    site.discover()
    with pytest.raises(OSError, match="disk") as caught:
        _discovery.first("resolve_source", source="toy://x")
    assert caught.value.__notes__ == ["raised by plugin 'bad' in resolve_source"]


def test_upstream_is_noticed(site):
    site.discover()
    assert registry.problems() == list(_discovery.catalog().problems)
    site.install("upstream", "DIFFSYNTH_API = 1\n", package="diffsynth_upstream")
    info = site.folder / "diffsynth-2.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: diffsynth\nVersion: 2.1.2\n")
    (problem,) = [problem for problem in registry.problems() if problem.distribution == "diffsynth"]
    assert problem.version == "2.1.2"
    assert "pip uninstall diffsynth" in problem.error
