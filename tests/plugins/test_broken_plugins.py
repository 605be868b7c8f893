"""Each way for a plugin to fail, alone and then all at once: it is reported by name, and a good one beside it works."""

import json
import os
import subprocess
import sys

import pytest

from diffsynth import _discovery, registry
from diffsynth.errors import BrokenPlugin, UnknownModel
from fake_plugins import good, install

HEAD = """from diffsynth.hookspecs import hookimpl
from diffsynth.spec import DoorSpec, ModelSpec
DIFFSYNTH_API = 1
@hookimpl
"""

BROKEN = {
    "import_error": ("import no_such_module\n", "No module named 'no_such_module'"),
    "syntax_error": ("def broken(:\n", "SyntaxError"),
    "system_exit": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "raises": ("raise RuntimeError('at import')\n", "RuntimeError: at import"),
    "unknown_argument": (HEAD + "def register_models(register, nonsense): ...\n", "nonsense"),
    "unknown_hook": (
        HEAD + "def register_model(register): ...\n",
        "hook 'register_model', which does not exist; did you mean 'register_models'?",
    ),
    "declaration_raises": (HEAD + "def register_models(register): 1 / 0\n", "ZeroDivisionError"),
    "declaration_exits": (HEAD + "def register_models(register): raise SystemExit\n", "SystemExit"),
    "wrong_type": (
        HEAD + "def register_models(register): register({'name': 'x'})\n",
        "register_models: expected ModelSpec, got dict",
    ),
    "wrong_kind": (
        HEAD + "def register_models(register): register(DoorSpec(name='x', folder='y:z'))\n",
        "expected ModelSpec, got DoorSpec",
    ),
    "dead_reference": (
        good("fake_dead_reference", "dead").replace(".pipeline:", ".pipelin:"),
        "there is no module 'fake_dead_reference.pipelin'",
    ),
    "malformed_reference": (good("x", "y").replace(":ToyPipeline", ""), "expected 'package.module:attribute'"),
    "malformed_source": (good("x", "y").replace("Owner/y:*.safe", "*.safe"), "expected 'owner/repository:pattern'"),
    "twice": (
        HEAD + "def register_doors(register):\n    for _ in range(2): register(DoorSpec(name='same', folder='x:y'))\n",
        "'same' is declared twice",
    ),
    "no_api": ("", "states no DIFFSYNTH_API; expected DIFFSYNTH_API = 1"),
    "old_api": ("DIFFSYNTH_API = 0\n", "Run: pip install -U fake-old-api"),
    "new_api": ("DIFFSYNTH_API = 99\n", "Run: pip install -U diffsynth-core"),
    "wrapper": (
        HEAD.replace("@hookimpl", "@hookimpl(wrapper=True)") + "def step_done(step): return (yield)\n",
        "wraps hook 'step_done'",
    ),
    "asks_too_early": (
        HEAD + "def register_models(register):\n    from diffsynth import registry\n    registry.list()\n",
        "asks for the catalog while it is being made",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_alone(site, name, caplog):
    code, message = BROKEN[name]
    site.install("zzz_good", good("fake_zzz_good", "fine"))
    site.install(name, code)
    catalog = site.discover()
    (problem,) = catalog.problems
    assert (problem.plugin, problem.version) == (name, "1.0")
    assert problem.distribution == f"fake-{name}".replace("_", "-")
    assert message in problem.error
    assert "\n" not in problem.error
    assert "Traceback" in problem.traceback
    assert [model.spec.name for model in catalog.models] == ["fine"]
    assert name in caplog.text
    assert "Run: diffsynth plugins" in caplog.text


def test_all_at_once(site):
    for name, (code, _) in BROKEN.items():
        site.install(name, code)
    site.install("missing", good("fake_missing", "x"), target="fake_missing.plugin:Nothing")
    site.install("mmm_good", good("fake_mmm_good", "fine"))
    catalog = site.discover()
    assert {problem.plugin for problem in catalog.problems} == {*BROKEN, "missing"}
    for problem in catalog.problems:
        assert BROKEN.get(problem.plugin, ("", "Nothing"))[1] in problem.error
    assert [model.spec.name for model in catalog.models] == ["fine"]
    assert registry.get("fine").plugin == "mmm_good"
    with pytest.raises(
        UnknownModel, match=rf"'fin' is not installed; did you mean 'fine'\?  {len(BROKEN) + 1} plugins"
    ):
        registry.get("fin")


def test_keyboard_interrupt_passes(site):
    site.install("interrupted", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        site.discover()


def test_strict_mode_raises(site, monkeypatch):
    site.install("broken", "import no_such_module\n")
    monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "1")
    with pytest.raises(BrokenPlugin, match=r"broken \(fake-broken 1\.0\): No module named 'no_such_module'"):
        site.discover()


def test_two_plugins_of_one_name_are_both_problems(site):
    site.install("twin", good("fake_twin_a", "a"), package="fake_twin_a")
    site.install("twin", good("fake_twin_b", "b"), package="fake_twin_b")
    catalog = site.discover()
    assert [problem.distribution for problem in catalog.problems] == ["fake-twin-a", "fake-twin-b"]
    assert all("fake-twin-a 1.0 and fake-twin-b 1.0" in problem.error for problem in catalog.problems)
    assert catalog.models == ()


def test_two_doors_of_one_name_are_a_problem_of_both(site):
    for name in ("a", "b"):
        site.install(
            name, HEAD + f"def register_doors(register): register(DoorSpec(name='d', folder='fake_{name}:d'))\n"
        )
    catalog = site.discover()
    assert [(problem.plugin, problem.error) for problem in catalog.problems] == [
        ("a", "door 'd' is also declared by b (fake-b)"),
        ("b", "door 'd' is also declared by a (fake-a)"),
    ]
    assert len(catalog.doors) == 2


@pytest.mark.parametrize("heavy", _discovery.HEAVY)
def test_a_light_module_that_imports_heavy_code(tmp_path, heavy):
    """The heavy package is a fake one: what counts is that it was imported by the plugin, in a fresh process."""
    (tmp_path / f"{heavy}.py").write_text("")
    install(tmp_path, "heavy", f"import {heavy}\n" + good("fake_heavy", "a"))
    install(tmp_path, "light", good("fake_light", "b"))
    code = (
        "import json; from diffsynth import _discovery; c = _discovery.catalog();"
        "print(json.dumps([[p.plugin, p.error] for p in c.problems] + [m.spec.name for m in c.models]))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "DIFFSYNTH_PLUGINS": "heavy,light"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    problem, model = json.loads(result.stdout)
    assert problem[0] == "heavy"
    assert problem[1].startswith(f"imports {heavy} at import")
    assert model == "b"
