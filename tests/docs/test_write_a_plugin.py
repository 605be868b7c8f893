"""Tests of the page "Write a plugin": its tutorial runs in an empty folder, its walk quotes the sources."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from diffsynth import _discovery
from diffsynth.cli.group import program
from diffsynth.runtime.feature import Condition, Feature, StepContext
from diffsynth.runtime.unit import Phase
from documented import blocks
from source_tree import ROOT, SOURCES

PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
TUTORIAL, _, WALK = PAGE.partition("## A conditioning of your own pipeline\n")
EXAMPLE = ROOT / "examples" / "third_party_plugin"
FILES = {file: text for file, _, text in blocks(TUTORIAL) if file}

CAMERA, SPEED = re.findall(r"^### With(?:out)? a network: .+?(?=^### )", WALK, flags=re.MULTILINE | re.DOTALL)
WAN = SOURCES["diffsynth_wan"].parent
NETWORK = ("checkpoints.py", "config.py", "dit.py", "extension.py", "models.py", "tiny.py")
"""Files of the networks that have a layer for camera rays, and of their models; no part of the conditioning."""

NAMES = {
    "camera": (CAMERA, r"(?<!Control-)camera", NETWORK),
    "speed": (SPEED, r"speed_?control(?!-v1:)|(?-i:\bSPEED\b)|SpeedArguments|motion_?controller|motion_bucket", ()),
}
"""Conditioning -> its part of the page, the words that name it, files that do not count."""


@pytest.mark.parametrize("file", FILES)
def test_it_tells_the_same_story_as_the_example(file):
    assert FILES[file] == (EXAMPLE / file).read_text(encoding="utf-8"), f"copy {file} into the page"


def test_it_tells_the_whole_story():
    assert {file for file in FILES if file.endswith(".py")} == {
        file.relative_to(EXAMPLE).as_posix() for file in EXAMPLE.rglob("*.py")
    }


QUOTES = [pytest.param(file, text, id=f"{file}-{number}") for number, (file, _, text) in enumerate(blocks(WALK))]


@pytest.mark.parametrize(("file", "text"), QUOTES)
def test_the_walk_quotes_the_sources(file, text):
    source = (WAN.parent / file).read_text(encoding="utf-8")
    assert f"\n{text}" in f"\n{source}", f"docs/write-a-plugin.md: copy these lines of {file} anew"


@pytest.mark.parametrize("name", NAMES)
def test_the_walk_lists_all_files_and_lines(name):
    part, words, others = NAMES[name]
    rows = dict(re.findall(r"^\| `diffsynth_wan/([\w./]+)` \| (own file|\d+) \|", part, flags=re.MULTILINE))
    quoted: dict[str, list[str]] = {}
    for file, _, text in blocks(part):
        quoted.setdefault(file.removeprefix("diffsynth_wan/"), []).extend(line.strip() for line in text.splitlines())
    pattern, touched = re.compile(words, re.IGNORECASE), set()
    for path in sorted(WAN.rglob("*.py")):
        file = path.relative_to(WAN).as_posix()
        named = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)]
        if file in others or not named:
            continue
        touched.add(file)
        if rows.get(file) != "own file":
            assert set(named) <= set(quoted.get(file, ())), f"{file} has further lines of the conditioning {name}"
    assert {file for file in rows if file.endswith(".py")} == touched
    for file, lines in rows.items():
        assert (WAN / file).is_file()
        assert lines in ("own file", str(len(quoted.get(file, ())))), f"{file}: {len(quoted[file])} lines are quoted"


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("part of a `Feature`", [field.name for field in fields(Feature)]),
        ("`Condition`", [field.name for field in fields(Condition)]),
        ("`StepContext`", [field.name for field in fields(StepContext)]),
        ("phase", [phase.name for phase in Phase]),
    ],
)
def test_the_tables_of_parts_are_complete(header, names):
    table, *_ = re.findall(rf"^\| {re.escape(header)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", WALK, flags=re.MULTILINE)
    first_cells = [row.split("|")[1] for row in table.splitlines()]
    assert [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)] == names


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
    for file, language, text in blocks(TUTORIAL):
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        elif language == "sh":
            output = "".join(run(folder, line) for line in text.splitlines())
        elif language == "python":
            output = captured(lambda code=text: run_as_script(code))
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


def run_as_script(code: str) -> None:
    """Run a block as the module `__main__`, as a notebook does."""
    module = types.ModuleType("__main__")
    with mock.patch.dict(sys.modules, {"__main__": module}):
        exec(code, vars(module))


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
