"""No plugin hurts another, or the program: whatever one does, the others are listed, and it is named."""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings

import pytest
from click.testing import CliRunner

from diffsynth import _discovery, registry
from diffsynth.cli.group import program
from diffsynth.errors import BrokenPlugin, RegistryError, UnknownModel
from diffsynth.runtime import writers
from diffsynth.spec import ModelSpec, resolve
from fake_plugins import good, install


def listed():
    """Return the names of the models that `diffsynth list --json` prints."""
    result = CliRunner().invoke(program, ["list", "--json"])
    assert result.exit_code == 0, result.output
    return [record["name"] for record in json.loads(result.stdout)]


@pytest.mark.parametrize("name", ["core", "Core", "CORE", "\uff43ore"])
def test_nobody_takes_the_name_of_core(site, name):
    site.install("good", good("fake_good", "fine"))
    site.install(name, good("fake_thief", "stolen"), package="fake_thief")
    catalog = site.discover()
    assert [plugin.name for plugin in catalog.plugins] == ["core", "good"]
    (problem,) = catalog.problems
    assert (problem.plugin, problem.distribution) == (name, "fake-thief")
    assert problem.error == (
        f"the name 'core' is that of diffsynth-core; rename the entry point {name!r} of fake-thief, "
        "or run: pip uninstall fake-thief"
    )


@pytest.mark.parametrize("name", ["our_own", "our-own", "Our.Own"])
def test_a_name_is_that_of_the_distribution_called_so(site, name):
    """A plugin of another distribution with the name of one of our families made the family vanish."""
    site.install("our_own", good("diffsynth_our_own", "family"), package="diffsynth_our_own")
    site.install(name, good("fake_thief", "stolen"), package="fake_thief")
    catalog = site.discover()
    assert [one.spec.name for one in catalog.models] == ["family"]
    (problem,) = catalog.problems
    assert (problem.plugin, problem.distribution) == (name, "fake-thief")
    assert "the name 'our-own' is that of diffsynth-our-own; rename the entry point" in problem.error
    del sys.modules["diffsynth_our_own"], sys.modules["diffsynth_our_own.plugin"]


def test_an_entry_point_to_the_module_of_another_plugin(site):
    """The second one to load unregistered the module, and the first lost its observers."""
    site.install("alpha", "", target="fake_good.plugin")
    site.install("beta", "", target="diffsynth.models.plugin")
    site.install("good", good("fake_good", "fine"))
    site.install("other", good("fake_other", "other"))
    catalog = site.discover()
    assert [plugin.name for plugin in catalog.plugins] == ["core", "other"]
    assert {problem.plugin: problem.error for problem in catalog.problems} == {
        "alpha": "fake-alpha 1.0 and fake-good 1.0 declare a plugin of this module; uninstall all but one",
        "beta": "the module 'diffsynth.models.plugin' is that of diffsynth-core; rename the entry point 'beta' of "
        "fake-beta, or run: pip uninstall fake-beta",
        "good": "fake-alpha 1.0 and fake-good 1.0 declare a plugin of this module; uninstall all but one",
    }


@pytest.mark.parametrize("name", ["", "a b", "a\x1b[2Jb"])
def test_names_that_cannot_be_used(site, monkeypatch, name):
    site.install("good", good("fake_good", "fine"))
    site.install(name, good("fake_bad", "bad"), package="fake_bad")
    monkeypatch.delenv("DIFFSYNTH_PLUGINS")
    site.discover()
    (problem,) = registry.problems()
    assert (problem.plugin, problem.distribution) == (name, "fake-bad")
    assert "expected a name of letters, digits, '_', '-' and '.'" in problem.error
    assert {"fine", "z-image-turbo"} <= set(listed())


def test_a_damaged_distribution_hides_no_other(site, monkeypatch):
    """One undecodable `entry_points.txt` of any installed package made `list()` raise."""
    site.install("good", good("fake_good", "fine"))
    site.install("damaged", good("fake_damaged", "damaged"))
    (site.folder / "fake_damaged-1.0.dist-info" / "METADATA").write_bytes(b"\xff")
    other = site.folder / "fake_other-3.1.dist-info"
    other.mkdir()
    (other / "entry_points.txt").write_bytes(b"[console_scripts]\na = \xff")
    site.discover()
    assert listed() == ["fine"]
    states = {problem.distribution: (problem.plugin, problem.version, problem.state) for problem in registry.problems()}
    assert states == {
        "fake-damaged": ("damaged", "1.0", "broken"),
        "fake-other": ("fake-other", "3.1", "warning"),
    }
    assert all("Run: pip install --force-reinstall --no-deps fake-" in each.error for each in registry.problems())
    monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "1")
    with pytest.raises(
        BrokenPlugin, match=r"^damaged \(fake-damaged 1\.0\): METADATA is no UTF-8 text[^;]*; or delete \S+$"
    ):
        site.discover()


HEAD = """import os, sys
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import *
DIFFSYNTH_API = 2
"""

MODEL = (
    HEAD
    + """
{before}
@hookimpl
def register_models(register):
    register(ModelSpec(**dict(name="odd", family="toy", task="text-to-image", pipeline="fake_odd.pipeline:ToyPipeline",
                              components={{"dit": "Owner/odd:*.safetensors"}}) | dict({fields})))
"""
)


def only_problem(site, code, *, state="broken"):
    """Install a plugin `odd` between two good ones; return its only problem, the others being listed."""
    site.install("aaa", good("fake_aaa", "first"))
    site.install("odd", code)
    site.install("zzz", good("fake_zzz", "last"))
    site.discover()
    works = ["odd"] if state == "warning" else []
    assert listed() == ["first", "last", *works]
    (problem,) = registry.problems()
    assert (problem.plugin, problem.distribution, problem.version) == ("odd", "fake-odd", "1.0")
    assert problem.state == state
    assert problem.error.isprintable()
    assert CliRunner().invoke(program, ["plugins"]).exit_code == (state == "broken")
    result = CliRunner().invoke(program, ["plugins", "--json"])
    assert json.loads(result.stdout)["problems"][0]["error"] == problem.error
    return problem


HOSTILE = """
class Text(str):
    def __eq__(self, other): raise RuntimeError
    def __hash__(self): return 1 / 0
    def __str__(self): return 1 / 0
    __lt__ = __repr__ = __eq__
class Number(int):
    __lt__ = __repr__ = __str__ = lambda *a: 1 / 0
class Table(dict):
    items = keys = __iter__ = __repr__ = lambda *a: 1 / 0
class Thing:
    def __repr__(self): raise SystemExit
class Spec(ModelSpec):
    family = "x"
loop = {}
loop["x"] = loop
deep = []
for _ in range(10000): deep = [deep]
"""

VALUES = {
    "defaults={'x': object()}": "defaults['x'] is <object object at",
    "defaults={'x': float('nan')}": "defaults['x'] is nan; expected a finite number",
    "defaults={'x': [1.0, float('-inf')]}": "defaults['x'][1] is -inf; expected a finite number",
    "defaults={'x': {1, 2}}": "defaults['x'] is {1, 2}, a set; expected a str",
    "defaults={'x': b'x'}": "defaults['x'] is b'x', a bytes",
    "defaults={'x': 1j}": "a complex",
    "defaults={'x': loop}": "nested in more than 16 levels",
    "defaults={'x': deep}": "nested in more than 16 levels",
    "defaults={'x': {1: 2}}": "defaults['x'] is a dict with the key 1; expected texts as keys",
    "defaults={None: 2}": "defaults is a dict with the key None",
    "defaults={'x': 10**5000}": "an integer of 16610 bits; expected at most 64",
    "defaults={'x': Text('x')}": "is 'x', a Text; expected a str",
    "defaults={'x': Number(1)}": "an object of Number, a Number",
    "defaults={'x': Table()}": "an object of Table, a Table",
    "defaults=Table()": "defaults is an object of Table, expected a mapping",
    "defaults={Text('x'): 1}": "",
    "defaults={'x': '\\ud800'}": "which has a lone surrogate",
    "defaults=7": "defaults is 7, expected a mapping",
    "name=Text('odd')": "name is ",
    "name=5": "name is 5, a int; expected a str",
    "name='a\\x1b[2J'": "expected a plain name",
    "name=' a'": "expected a plain name",
    "name='a\\nb'": "expected a plain name",
    "task=object()": "task is <object object at",
    "task=None": "task is None, a NoneType; expected a str",
    "family=Thing()": "",
    "description=b'x'": "description is b'x', a bytes; expected a str",
    "components={'dit': 1}": "components['dit'] is 1, a int; expected a str",
    "fps=float('inf')": "fps is inf; expected a finite number",
    "fps='24'": "fps is '24'; expected an integer",
    "tiny={'dit': {'width': object()}}": "tiny['dit']['width'] is <object",
    "tea_cache=TeaCacheSpec(coefficients=(float('nan'),), signal='x')": "tea_cache.coefficients[0] is nan",
    "tea_cache=5": "tea_cache is 5, expected TeaCacheSpec",
}


@pytest.mark.parametrize("fields", VALUES)
def test_values_that_are_not_plain(site, fields):
    """One `object()` among the defaults of a model broke `diffsynth list --json` for all models."""
    problem = only_problem(site, MODEL.format(before=HOSTILE, fields=fields))
    assert VALUES[fields] in problem.error


def test_a_subclass_of_a_declaration(site):
    code = MODEL.format(before=HOSTILE, fields="").replace("register(ModelSpec(", "register(Spec(")
    assert "register_models: expected ModelSpec, got Spec: " in only_problem(site, code).error


def test_a_number_that_others_are_sorted_by(site):
    code = HEAD + "@hookimpl\ndef register_attention(register):\n"
    code += "    register(AttentionSpec(name='odd', backend='fake_odd.pipeline:x', priority='high'))\n"
    assert only_problem(site, code).error == "register_attention: 'odd': priority is 'high'; expected an integer"


def test_declarations_that_change_later(site):
    """The catalog holds copies, so that nothing that a plugin does later changes or breaks it."""
    code = good("fake_odd", "odd").replace("    register(ModelSpec(", "    seen.append(ModelSpec(")
    code = code.replace("@hookimpl", "seen = []\n\n\n@hookimpl") + "    register(seen[0])\n"
    site.install("odd", code)
    site.discover()
    seen = sys.modules["fake_odd.plugin"].seen[0]
    seen.components["dit"] = object()
    seen.defaults[5] = seen
    object.__setattr__(seen, "name", None)
    assert listed() == ["odd"]
    assert registry.get("odd").components == {"dit": "Owner/odd:*.safetensors"}


HOOKS = {
    "async def register_models(register): ...": "hook 'register_models' is an async function",
    "def register_models(register): yield": "hook 'register_models' is a generator",
    "async def register_models(register): yield": "hook 'register_models' is an async function",
    "def register_models(register): return work()": "hook 'register_models' returns a coroutine",
    "def register_models(register): return iter(())": "hook 'register_models' returns a tuple_iterator",
    "async def step_done(step): ...": "hook 'step_done' is an async function",
    "def resolve_source(source): yield source": "hook 'resolve_source' is a generator",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_do_not_return_at_once(site, hook):
    problem = only_problem(site, f"{HEAD}async def work(): ...\n@hookimpl\n{hook}\n")
    assert HOOKS[hook] in problem.error
    assert "expected a plain function" in problem.error


def test_register_is_called_too_late(site):
    site.install("odd", HEAD + "kept = []\n@hookimpl\ndef register_models(register): kept.append(register)\n")
    site.install("good", good("fake_good", "fine"))
    site.discover()
    (register,) = sys.modules["fake_odd.plugin"].kept
    model = registry.get("fine")
    with pytest.raises(RuntimeError, match=r"plugin 'odd' \(fake-odd 1\.0\) calls register\(\) after register_mod"):
        register(model)
    assert listed() == ["fine"]
    assert registry.problems() == []


def test_a_refused_declaration_is_named_even_if_the_hook_catches_the_error(site):
    code = HEAD + "@hookimpl\ndef register_models(register):\n    try: register(5)\n    except Exception: pass\n"
    assert only_problem(site, code).error == "register_models: expected ModelSpec, got int: 5"


ENDS = {
    "raise SystemExit(3)": "SystemExit: 3",
    "sys.exit('bye')": "SystemExit: bye",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise GeneratorExit": "GeneratorExit",
    "raise type('Own', (BaseException,), {})('x')": "Own: x",
}
FAILS = {
    "raise RecursionError('deep')": "RecursionError: deep",
    "(f := lambda: f())()": "RecursionError: maximum recursion depth",
    "raise MemoryError": "MemoryError",
    "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})": "Mute: its text cannot be read",
    "raise ValueError('a\\nb \\ud800')": r"ValueError: a b \ud800",
}


@pytest.mark.parametrize("place", ["import", "hook"])
@pytest.mark.parametrize("line", [*ENDS, *FAILS])
def test_what_a_plugin_raises(site, line, place):
    code = f"{HEAD}{line}\n" if place == "import" else f"{HEAD}@hookimpl\ndef register_models(register): {line}\n"
    error = only_problem(site, code).error
    if line in ENDS:
        assert error == (
            f"ends the program while it is loaded ({ENDS[line]}); do that inside a function only. "
            "Without the plugin: pip uninstall fake-odd"
        )
    else:
        assert FAILS[line] in error


@pytest.fixture
def usual_sigint():
    """Python's own handler of SIGINT, which a process in the background of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("code", ["", "\nexcept BaseException: pass"])
def test_ctrl_c_of_the_user_passes(site, usual_sigint, code):
    """Also where the plugin catches it."""
    interrupt = "import signal\nsignal.raise_signal(signal.SIGINT)"
    site.install("odd", "try:\n  " + interrupt.replace("\n", "\n  ") + code if code else interrupt)
    with pytest.raises(KeyboardInterrupt):
        site.discover()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


CHANGES = {
    "sys.path.insert(0, '/nowhere')": "sys.path",
    "sys.path = ['/nowhere']": "sys.path",
    "sys.meta_path.clear()": "sys.meta_path",
    "os.chdir('/')": "the working directory",
    "sys.stdout = sys.stderr = None": "sys.stdout, sys.stderr",
    "sys.excepthook = print": "sys.excepthook",
    "import signal; signal.signal(signal.SIGINT, print)": "the handler of SIGINT",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)": "the handler of SIGTERM",
    "import locale; locale.setlocale(locale.LC_ALL, 'C.UTF-8' if locale.setlocale(0) == 'C' else 'C')": "the locale",
    "os.environ['HF_ENDPOINT'] = 'x'; os.environ.pop('PATH')": "environment variables (HF_ENDPOINT, PATH)",
    "import warnings; warnings.simplefilter('ignore')": "warnings.filters",
    "sys.setrecursionlimit(5000)": "the recursion limit",
    "import logging; logging.root.setLevel(1)": "the level of the root logger",
    "import logging; logging.root.addHandler(logging.NullHandler())": "logging.root.handlers",
    "import diffsynth; diffsynth.registry.list = print": "diffsynth.registry.list",
    "from diffsynth import _discovery; _discovery.catalog = print": "diffsynth._discovery.catalog",
    "from diffsynth import _discovery; del _discovery.notify": "diffsynth._discovery.notify",
    "ModelSpec.__eq__ = print": "diffsynth.spec.ModelSpec.__eq__",
    "ModelSpec.__getattribute__ = object.__getattribute__": "diffsynth.spec.ModelSpec.__getattribute__",
    "import json; json.dumps = print": "json.dumps",
    "import builtins; builtins.open = print": "builtins.open",
    "sys.modules['diffsynth.registry'] = sys": "sys.modules['diffsynth.registry']",
}


@pytest.mark.parametrize("line", CHANGES)
def test_what_a_plugin_changes_is_named_and_set_back(site, line):
    import diffsynth.registry

    def state():
        lists = [list(sys.path), list(sys.meta_path), list(warnings.filters), list(logging.root.handlers)]
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        ours = diffsynth.registry.list, _discovery.catalog, _discovery.notify, ModelSpec.__eq__, json.dumps, open
        streams = sys.stdout, sys.stderr, sys.excepthook, sys.modules["diffsynth.registry"]
        return os.getcwd(), dict(os.environ), lists, handlers, ours, streams, "__getattribute__" in vars(ModelSpec)

    for name in ("aaa", "odd", "zzz"):
        site.install(name, good(f"fake_{name}", name) + (f"\n\nimport os, sys\n{line}\n" if name == "odd" else ""))
    code = (site.folder / "fake_odd" / "plugin.py").read_text()
    (site.folder / "fake_odd" / "plugin.py").write_text(code.replace("import ModelSpec", "import ModelSpec, DoorSpec"))
    before = state()
    site.discover()
    assert state() == before
    assert listed() == ["aaa", "odd", "zzz"]
    (problem,) = registry.problems()
    assert (problem.plugin, problem.state) == ("odd", "warning")
    assert problem.error == (
        f"changes the process while it is loaded: {CHANGES[line]}; set back. Do that inside a function only"
    )


def test_a_thread_that_a_plugin_starts_is_named(site):
    code = "\n\nimport threading\ndone = threading.Event()\n"
    code += "threading.Thread(target=done.wait, name='busy', daemon=True).start()\n"
    problem = only_problem(site, good("fake_odd", "odd") + code, state="warning")
    assert "changes the process while it is loaded: threads that it started (busy)" in problem.error
    sys.modules["fake_odd.plugin"].done.set()


def test_a_thread_that_asks_for_the_catalog(site, monkeypatch):
    """The plugin waited for its thread, which waited for discovery: the program hung."""
    monkeypatch.setattr(_discovery, "LONGEST_WAIT", 0.1)
    code = HEAD + "import threading\nfrom diffsynth import registry\nfailed = []\n"
    code += "def ask():\n    try: registry.list()\n    except RuntimeError as error: failed.append(error)\n"
    code += "thread = threading.Thread(target=ask)\nthread.start()\nthread.join()\nraise failed[0]\n"
    assert "another thread has been loading plugins for 0.1 s; a plugin must" in only_problem(site, code).error


@pytest.mark.parametrize("place", ["import", "hook"])
def test_a_slow_plugin_works_and_is_named(site, monkeypatch, place):
    monkeypatch.setattr(_discovery, "SLOW", 0.2)
    code = good("fake_odd", "odd").replace("DIFFSYNTH_API", "import time\nDIFFSYNTH_API")
    code += "time.sleep(0.3)\n" if place == "import" else "    time.sleep(0.3)\n"
    problem = only_problem(site, code, state="warning")
    assert problem.error.startswith(f"takes {problem.seconds:.1f} s to load; import slow code")
    assert 0.3 <= problem.seconds < 30
    rows = [line.split() for line in CliRunner().invoke(program, ["plugins"]).stdout.splitlines()]
    assert ["odd", "fake-odd", "1.0", "warning", "1", "models"] in rows
    with pytest.raises(UnknownModel, match=r"Run: diffsynth list$"):  # it hides no model
        registry.get("nothing")


PRINTS = ("print('noise')", "sys.stdout.write('noise\\n')", "sys.stdout.writelines(['noise\\n'])")


@pytest.mark.parametrize("place", ["import", "hook"])
@pytest.mark.parametrize("line", PRINTS)
def test_what_a_plugin_prints_goes_to_stderr(site, capsys, line, place):
    code = good("fake_odd", "odd").replace("DIFFSYNTH_API", "import sys\nDIFFSYNTH_API")
    site.install("odd", code + (f"{line}\n" if place == "import" else f"    {line}\n"))
    site.discover()
    assert capsys.readouterr() == ("", "noise\n")


OBSERVER = (
    HEAD
    + """seen = []
@hookimpl
def step_done(step):
    seen.append(step)
    {line}
@hookimpl
def resolve_source(source):
    {line}
"""
)


@pytest.mark.parametrize("line", [*ENDS, *FAILS])
def test_an_observer_that_raises_anything_ends_nothing(site, caplog, line):
    site.install("bad", OBSERVER.format(line=line))
    site.install("good", OBSERVER.format(line="return None"))
    site.discover()
    for step in range(2):
        _discovery.notify("step_done", pipeline=None, step=step, num_steps=2, sigma=0.5)
    assert sys.modules["fake_bad.plugin"].seen == sys.modules["fake_good.plugin"].seen == [0, 1]
    assert caplog.text.count("plugin 'bad' failed in step_done; the run goes on") == 1
    with pytest.raises(BrokenPlugin if line in ENDS else Exception) as caught:
        _discovery.first("resolve_source", source="toy://x")
    said = str(caught.value) if line in ENDS else caught.value.__notes__[0]
    assert "plugin 'bad'" in said
    assert "resolve_source" in said


def test_ctrl_c_in_an_observer_passes(site, usual_sigint):
    site.install("slow", OBSERVER.format(line="import signal; signal.raise_signal(signal.SIGINT)"))
    site.discover()
    with pytest.raises(KeyboardInterrupt):
        _discovery.notify("step_done", pipeline=None, step=0, num_steps=2, sigma=0.5)
    with pytest.raises(KeyboardInterrupt):
        _discovery.first("resolve_source", source="toy://x")


NOISE = """
import os, subprocess, sys
print("noise")
sys.__stdout__.write("noise\\n")
os.write(1, b"noise\\n")
subprocess.run([sys.executable, "-S", "-c", "print('noise')"], check=True)
"""


def test_standard_output_of_json_is_json_whatever_writes_to_it(tmp_path):
    """At import and in a hook; `print`, writes to the file descriptor, and those of child processes."""
    inside = NOISE.replace("\n", "\n    ").rstrip()
    install(tmp_path, "noisy", f"{good('fake_noisy', 'noisy')}{inside}\n{NOISE}")
    settings = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "DIFFSYNTH_PLUGINS": "noisy"}
    command = [sys.executable, "-c", "from diffsynth.cli import main; main(['list', '--json'])"]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    assert [record["name"] for record in json.loads(result.stdout)] == ["noisy"]
    assert result.stderr.count("noise") == 8


@pytest.mark.parametrize("line", ["raise GeneratorExit('x')", "raise RuntimeError('x')"])
def test_a_command_that_raises_names_its_plugin(site, line):
    code = HEAD + "@hookimpl\ndef register_commands(register):\n"
    site.install("odd", code + "    register(CommandSpec(name='paint', command='fake_odd.cli:paint'))\n")
    (site.folder / "fake_odd" / "cli.py").write_text(f"import click\n\n\n@click.command()\ndef paint():\n    {line}\n")
    site.discover()
    with pytest.raises((GeneratorExit, RuntimeError)) as caught:
        program.main(["paint"], standalone_mode=False)
    assert caught.value.__notes__ == ["raised by the command 'paint' of a plugin. Run: diffsynth plugins"]


@pytest.mark.parametrize("name", ["a b", "-x", "plugin:list", "a\x1bb", ""])
def test_names_of_commands_that_cannot_be_used(site, name):
    code = HEAD + "@hookimpl\ndef register_commands(register):\n"
    code += f"    register(CommandSpec(name={name!r}, command='fake_odd.cli:paint'))\n"
    assert "register_commands: name " in only_problem(site, code).error


@pytest.mark.parametrize("line", ["raise GeneratorExit", "raise type('Own', (BaseException,), {})('x')"])
def test_code_that_ends_programs_on_first_use(site, line):
    site.install("odd", good("fake_odd", "fine"))
    (site.folder / "fake_odd" / "pipeline.py").write_text(f"{line}\n")
    site.discover()
    with pytest.raises(ImportError, match=r"'fake_odd\.pipeline' ends the program when it is imported"):
        resolve("fake_odd.pipeline:ToyPipeline")


def test_damaged_metadata_of_the_older_distribution(site):
    """It has our import name, so its version was asked for, and `problems()` raised."""
    info = site.folder / "diffsynth-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_bytes(b"Name: \xff")
    site.discover()
    assert "pip uninstall diffsynth" in next(each.error for each in registry.problems() if each.plugin == "diffsynth")
    with pytest.raises(UnknownModel):
        registry.get("nothing")


def test_a_source_that_is_no_list_of_files_names_its_plugin(site):
    site.install("odd", OBSERVER.format(line="return 'a/path'"))
    site.discover()
    with pytest.raises(TypeError, match="plugin 'odd' returned 'a/path' from resolve_source; expected a list, or N"):
        _discovery.first("resolve_source", source="toy://x")


def test_a_writer_that_ends_the_program_names_its_plugin(site, tmp_path):
    code = HEAD + "@hookimpl\ndef register_writers(register):\n"
    site.install("odd", code + "    register(WriterSpec(suffix='.odd', kind='image', writer='fake_odd.odd:write'))\n")
    (site.folder / "fake_odd" / "odd.py").write_text("def write(output, path, *, record): raise SystemExit(3)\n")
    site.discover()
    with pytest.raises(RegistryError, match=r"writer '\.odd' of plugin odd \(fake-odd 1\.0\) failed: SystemExit: 3"):
        writers.write(None, tmp_path / "a.odd", record={})
