"""Tests of the tutorial "Write a plugin": its blocks are run one by one in an empty folder."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffsynth import _discovery
from diffsynth.cli.group import program
from documented import blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "third_party_plugin"
FILES = {file: text for file, _, text in blocks(PAGE) if file}


@pytest.mark.parametrize("file", FILES)
def test_it_tells_the_same_story_as_the_example(file):
    assert FILES[file] == (EXAMPLE / file).read_text(encoding="utf-8"), f"copy {file} into the page"


def test_it_tells_the_whole_story():
    assert {file for file in FILES if file.endswith(".py")} == {
        file.relative_to(EXAMPLE).as_posix() for file in EXAMPLE.rglob("*.py")
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "toy")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("diffsynth_toy"):
            del sys.modules[name]
    _discovery._discovered = None


def test_it_works_by_the_letter(folder):
    output = ""
    for file, language, text in blocks(PAGE):
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        elif language == "sh":
            output = "".join(run(folder, line) for line in text.splitlines())
        elif language == "python":
            output = captured(lambda code=text: exec(code, {}))
        else:
            shown = [" ".join(line.split()) for line in output.splitlines()]
            for line in text.splitlines():
                assert any(line in each for each in shown), f"{line!r} is not in\n{output}"
    assert (folder / "red.png").stat().st_size > 100


def run(folder: Path, line: str) -> str:
    """Run a shell line and return its output; our programs run in this process, which has imported torch already."""
    name, *arguments = shlex.split(line)
    if name == "pip":
        assert arguments == ["install", "-e", ".[test]"]
        install(folder)
        return ""
    if name == "diffsynth":
        result = CliRunner().invoke(program, arguments)
        assert result.exit_code == 0, result.output
        return result.output
    if name == "python":
        return captured(lambda: run_script(folder / arguments[0]))
    if name == "pytest":
        codes: list[int] = []
        options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *arguments]
        output = captured(lambda: codes.append(pytest.main(options)))
        assert codes == [0], output
        return output
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout


def run_script(script: Path) -> None:
    """Run a script with a smaller number of training steps."""
    text = script.read_text(encoding="utf-8")
    shorter = re.sub(r"^(.*\bSTEPS = .*\b)\d{4,}$", r"\g<1>30", text, flags=re.MULTILINE)
    assert shorter != text
    script.write_text(shorter, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


def install(folder: Path) -> None:
    """Write the metadata of an editable install beside the sources; tests/packaging tests real wheels."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    information = folder / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(metadata, encoding="utf-8")
    entries = "".join(f"{name} = {target}\n" for name, target in project["entry-points"]["diffsynth"].items())
    (information / "entry_points.txt").write_text(f"[diffsynth]\n{entries}", encoding="utf-8")
    _discovery.refresh()


def captured(function) -> str:
    with redirect_stdout(StringIO()) as stream:
        function()
    return stream.getvalue()
