"""Tests of plugin failures, each alone and all together: each is reported by name, and a good plugin works."""

import json
import logging
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import diffsynth
from diffsynth import registry
from diffsynth._plugin_loading import HEAVY
from diffsynth.cli.group import program
from diffsynth.errors import BrokenPlugin, UnknownModel
from fake_plugins import good, install

HEAD = """from diffsynth.hookspecs import hookimpl
from diffsynth.spec import DoorSpec, ModelSpec
DIFFSYNTH_API = 2
@hookimpl
"""

BROKEN = {
    "import_error": ("import no_such_module\n", "No module named 'no_such_module'"),
    "syntax_error": ("def broken(:\n", "SyntaxError"),
    "system_exit": (
        "raise SystemExit(3)\n",
        "ends the program while it is loaded (SystemExit: 3); do that inside a function only. "
        "Without the plugin: pip uninstall fake-system-exit",
    ),
    "raises": ("raise RuntimeError('at import')\n", "RuntimeError: at import"),
    "missing_attribute": ("", "has no attribute 'Nothing'"),
    "unknown_argument": (HEAD + "def register_models(register, nonsense): ...\n", "nonsense"),
    "unknown_hook": (
        HEAD + "def register_model(register): ...\n",
        "hook 'register_model', which does not exist; did you mean 'register_models'?",
    ),
    "declaration_raises": (HEAD + "def register_models(register): 1 / 0\n", "ZeroDivisionError"),
    "declaration_exits": (HEAD + "def register_models(register): raise SystemExit\n", "(SystemExit); do that"),
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
    "text_for_tuple": (
        HEAD
        + "def register_checkpoints(register):\n    from diffsynth.spec import CheckpointSpec\n"
        + "    register(CheckpointSpec(name='x', architecture='y', files='Owner/y:*.safetensors'))\n",
        "'x': files is the text 'Owner/y:*.safetensors', expected a tuple",
    ),
    "malformed_suffix": (
        HEAD.replace("import DoorSpec", "import WriterSpec, DoorSpec")
        + "def register_writers(register): register(WriterSpec(suffix='wav', kind='audio', writer='x:y'))\n",
        "register_writers: suffix 'wav': expected a dot and a name, such as '.wav'",
    ),
    "writer_without_a_kind": (
        HEAD.replace("import DoorSpec", "import WriterSpec, DoorSpec")
        + "def register_writers(register): register(WriterSpec(suffix='.wav', kind='', writer='x:y'))\n",
        "register_writers: writer of '.wav': kind is empty",
    ),
    "twice": (
        HEAD + "def register_doors(register):\n    for _ in range(2): register(DoorSpec(name='same', folder='x:y'))\n",
        "'same' is declared twice",
    ),
    "same_name": (good("fake_same_name", "x"), "fake-same-name 1.0 and fake-second 1.0 declare a plugin of this name"),
    "no_api": ("", "states no DIFFSYNTH_API; expected DIFFSYNTH_API = 2"),
    "old_api": (
        "DIFFSYNTH_API = 0\n",
        "written for DIFFSYNTH_API 0, diffsynth-core has 2. Run: pip install -U fake-old-api",
    ),
    "new_api": (
        "DIFFSYNTH_API = 99\n",
        "written for DIFFSYNTH_API 99, diffsynth-core has 2. Run: pip install -U diffsynth-core",
    ),
    "wrapper": (
        HEAD.replace("@hookimpl", "@hookimpl(wrapper=True)") + "def step_done(step): return (yield)\n",
        "wraps hook 'step_done'",
    ),
    "asks_too_early": (
        HEAD + "def register_models(register):\n    from diffsynth import registry\n    registry.list()\n",
        "asks for the catalog while discovery runs",
    ),
}


KINDS = {
    "ImportError": ("import_error", "raises"),
    "SyntaxError": ("syntax_error",),
    "SystemExit at import": ("system_exit", "declaration_exits"),
    "entry point to a missing attribute": ("missing_attribute",),
    "hook with an unknown argument": ("unknown_argument",),
    "unknown hook name": ("unknown_hook",),
    "declaration that raises": ("declaration_raises", "asks_too_early"),
    "spec of a wrong type or with a dead reference": (
        "wrong_type",
        "wrong_kind",
        "dead_reference",
        "malformed_reference",
        "malformed_source",
        "text_for_tuple",
        "malformed_suffix",
        "writer_without_a_kind",
    ),
    "duplicate names": ("twice", "same_name"),
    "torch imported by a light module": ("torch",),
    "wrong API version": ("no_api", "old_api", "new_api", "wrapper"),
}
"""Kinds of failure that discovery must survive -> examples in `BROKEN`."""


def install_broken(site, name):
    site.install(name, BROKEN[name][0], target="fake_missing_attribute.plugin:Nothing" * (name == "missing_attribute"))
    if name == "same_name":
        site.install(name, BROKEN[name][0], package="fake_second")


def test_every_example_is_of_a_kind():
    assert len(KINDS) == 11
    assert sorted(name for names in KINDS.values() for name in names) == sorted([*BROKEN, "torch"])


@pytest.mark.parametrize("name", BROKEN)
def test_each_alone_in_the_four_places(site, name, caplog):
    site.install("zzz_good", good("fake_zzz_good", "fine"))
    install_broken(site, name)
    site.discover()
    assert [record.name for record in registry.list()] == ["fine"]

    problem, *others = registry.problems()
    assert len(others) == (name == "same_name")
    assert (problem.plugin, problem.version) == (name, "1.0")
    assert problem.distribution == f"fake-{name}".replace("_", "-")
    assert BROKEN[name][1] in problem.error
    assert "\n" not in problem.error
    assert "Traceback" in problem.traceback

    shown = CliRunner().invoke(program, ["plugins"])
    assert shown.exit_code == 1
    assert str(problem) in shown.stderr.splitlines()

    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(problem) in warning
    assert warning.endswith("Run: diffsynth plugins")

    with pytest.raises(UnknownModel, match=r"'fin' is not installed; did you mean 'fine'\?  \d plugin") as caught:
        registry.get("fin")
    assert str(problem) in str(caught.value)


def test_code_that_exits_on_first_use_does_not_end_its_host(site):
    site.install("quitter", good("fake_quitter", "fine"))
    (site.folder / "fake_quitter" / "pipeline.py").write_text("raise SystemExit(3)\n")
    site.discover()
    with pytest.raises(
        ImportError, match=r"'fake_quitter\.pipeline' ends the program when it is imported \(SystemExit: 3"
    ):
        diffsynth.load("fine")


def test_strict_mode_raises(site, monkeypatch):
    site.install("broken", "import no_such_module\n")
    monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "1")
    with pytest.raises(BrokenPlugin, match=r"broken \(fake-broken 1\.0\): No module named 'no_such_module'"):
        site.discover()


def test_two_plugins_of_one_name_are_both_problems(site):
    site.install("shared", good("fake_shared_a", "a"), package="fake_shared_a")
    site.install("shared", good("fake_shared_b", "b"), package="fake_shared_b")
    catalog = site.discover()
    assert [problem.distribution for problem in catalog.problems] == ["fake-shared-a", "fake-shared-b"]
    assert all("fake-shared-a 1.0 and fake-shared-b 1.0" in problem.error for problem in catalog.problems)
    assert catalog.models == ()


def test_two_doors_of_one_name_are_a_problem_of_both(site):
    for name in ("a", "b"):
        site.install(
            name, HEAD + f"def register_doors(register): register(DoorSpec(name='d', folder='fake_{name}:d'))\n"
        )
    catalog = site.discover()
    keep_one = "Keep one of them: pip uninstall fake-a, or: pip uninstall fake-b"
    assert [(problem.plugin, problem.error) for problem in catalog.problems] == [
        ("a", f"door 'd' is also declared by b (fake-b). {keep_one}"),
        ("b", f"door 'd' is also declared by a (fake-a). {keep_one}"),
    ]
    assert len(catalog.doors) == 2


PLACES = """
import json, logging
from click.testing import CliRunner
from diffsynth import registry
from diffsynth.cli.group import program

warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger().addHandler(handler)
problems = {problem.plugin: [problem.error, str(problem)] for problem in registry.problems()}
shown = CliRunner().invoke(program, ["plugins"])
try:
    registry.get("fin")
except Exception as error:
    lookup = str(error)
models = [record.name for record in registry.list()]
print(json.dumps([problems, models, shown.exit_code, shown.stderr, warnings, lookup]))
"""


def four_places(folder, plugins):
    """Return what a new process reports; heavy packages are empty fakes there, since only their import matters."""
    for heavy in HEAVY:
        (folder / f"{heavy}.py").write_text("")
    install(folder, "good", good("fake_good", "fine"))
    settings = {
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "DIFFSYNTH_PLUGINS": ",".join([*plugins, "good"]),
    }
    command = [sys.executable, "-c", PLACES]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("heavy", HEAVY)
def test_a_light_module_that_imports_heavy_code(tmp_path, heavy):
    install(tmp_path, "heavy", f"import {heavy}\n" + good("fake_heavy", "a"))
    problems, models, exit_code, shown, (warning,), lookup = four_places(tmp_path, ["heavy"])
    assert (list(problems), models, exit_code) == (["heavy"], ["fine"], 1)
    error, text = problems["heavy"]
    assert error.startswith(f"imports {heavy} at import; name heavy code by string, or import it inside a function")
    assert error.endswith('To see where: python -X importtime -c "import fake_heavy.plugin"')
    assert all(text in place for place in (shown, warning, lookup))


def test_all_at_once_beside_a_good_one(tmp_path):
    install(tmp_path, "torch", "import torch\n" + good("fake_torch", "a"))
    for name, (code, _) in BROKEN.items():
        install(tmp_path, name, code, target="fake_missing_attribute.plugin:Nothing" * (name == "missing_attribute"))
    install(tmp_path, "same_name", good("fake_second", "x"), package="fake_second")
    problems, models, exit_code, shown, (warning,), lookup = four_places(tmp_path, [*BROKEN, "torch"])
    assert (problems.keys(), models, exit_code) == ({*BROKEN, "torch"}, ["fine"], 1)
    for name, (error, text) in problems.items():
        assert BROKEN.get(name, ("", "imports torch at import"))[1] in error
        assert all(text in place for place in (shown, warning, lookup)), name
