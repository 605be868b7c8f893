"""Test of the pages on integrating a network: the blocks of all four run in order, as one package and one script."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffsynth import registry
from diffsynth.cli.group import program

FOLDER = Path(__file__).parents[2] / "docs" / "integrate"
PAGES = ("architecture.md", "pipeline.md", "memory.md", "training.md")
BLOCK = re.compile(
    r"(?:^`(?P<file>[\w./-]+)`(?P<continues>, continues)?\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    yield tmp_path
    registry.unregister("tiles")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiles"]:
        del sys.modules[name]


def run(line: str) -> str:
    """Run a line of a shell block in this process, where the plugin is registered, and return what it prints."""
    name, *arguments = shlex.split(line)
    assert name == "diffsynth"
    result = CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_pages_work_in_order(folder):
    output, names = "", {"__name__": "block"}
    for page in PAGES:
        for match in BLOCK.finditer((FOLDER / page).read_text(encoding="utf-8")):
            text = match["text"]
            if match["file"]:
                file = folder / match["file"]
                file.parent.mkdir(exist_ok=True)
                assert file.exists() == bool(match["continues"]), f"{page}: {file.name}"
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(f"\n\n{text}" if match["continues"] else text)
            elif match["language"] == "python":
                exec(text, names)
            elif match["language"] == "sh":
                output = "".join(map(run, text.splitlines()))
            else:
                shown = " ".join(output.split())
                assert all(" ".join(line.split()) in shown for line in text.splitlines()), f"{page}: {output}"
    assert names["losses"][-1] < names["losses"][0]
    assert names["image"].size == (32, 32)
    assert {path.name for path in folder.rglob("*.safetensors")} >= {"tilenet.safetensors", "net.safetensors"}


def test_all_pages_are_in_the_order():
    assert sorted(PAGES) == sorted(path.name for path in FOLDER.glob("*.md"))
