import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from diffsynth.cli.group import program
from source_tree import ROOT


def completions(*arguments, incomplete=""):
    found = ShellComplete(program, {}, "diffsynth", "_DIFFSYNTH_COMPLETE").get_completions(list(arguments), incomplete)
    return [(one.type, one.value) for one in found]


def test_names_of_models(installed):
    for command in ("generate", "plan", "info"):
        assert completions(command, incomplete="TOY") == [("plain", "toy-1")]
    assert completions("generate", incomplete="x") == []
    assert completions("info", incomplete="x") == [("file", "x")]


def test_options_and_their_values(installed):
    assert ("plain", "fp8") in completions("generate", "toy-1", "--policy")
    assert ("plain", "--grid") in completions("generate", "toy-1", incomplete="--g")
    for option in ("--lora", "--weights", "--config", "-o"):
        assert [kind for kind, _ in completions("generate", "toy-1", option, incomplete="a")] == ["file"]


def test_commands_without_importing_them(installed, monkeypatch):
    monkeypatch.setattr("diffsynth.cli.group.resolve", lambda reference: 1 / 0)
    found = dict(reversed(each) for each in completions())
    assert {"generate", "replay", "list"} <= set(found)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_call_by_bash_imports_no_torch():
    """The variables are those that the script of `_DIFFSYNTH_COMPLETE=bash_source diffsynth` sets."""
    code = (
        "import atexit, sys; atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)));"
        "from diffsynth.cli import main; main()"
    )
    words = "diffsynth generate z-image-n"
    given = {"COMP_WORDS": words, "COMP_CWORD": "2", "_DIFFSYNTH_COMPLETE": "bash_complete"}
    environment = {**os.environ, **given, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = f'"{sys.executable}" -c "{code}"'
    done = subprocess.run(["bash", "-c", line], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("plain,z-image-nano\n", "False")
    assert "bash_source" in Path(ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
