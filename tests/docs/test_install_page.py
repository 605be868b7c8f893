"""Tests of the page on installation: packages, extras, versions and sizes are those of the packages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from documented import sections
from source_tree import SOURCES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
PACKAGES = sections(PAGE)["Packages"]
ROWS = {name: row.split(" | ") for name, row in re.findall(r"^\| `(diffsynth-[\w-]+)` \| (.+) \|$", PACKAGES, re.M)}
PROJECTS = {
    project["name"]: project
    for path in ROOT.glob("packages/*/pyproject.toml")
    for project in [tomllib.loads(path.read_text(encoding="utf-8"))["project"]]
}
SHORT = {"PyAV": "av"}
"""Name of a library on the page -> its distribution, where they differ."""


def test_the_table_lists_the_packages():
    assert sorted(ROWS) == sorted(PROJECTS)
    assert sorted(row[0].strip("`") for row in ROWS.values()) == sorted(SOURCES)


@pytest.mark.parametrize("name", ROWS)
def test_a_package_requires_what_its_row_says(name):
    required = {Requirement(line).name for line in PROJECTS[name]["dependencies"]} - {"diffsynth-core"}
    shown = {SHORT.get(word, word) for word in ROWS[name][2].split(", ")} - {"core"}
    if name == "diffsynth-core":
        assert ROWS[name][2] == "torch, transformers and others"
        assert {"torch", "transformers"} <= required
    else:
        assert shown == required


@pytest.mark.parametrize("name", ROWS)
def test_the_installed_size_is_that_of_the_sources(name):
    folder = SOURCES[ROWS[name][0].strip("`")].parent
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert abs(float(ROWS[name][4]) - size / 1e6) <= max(0.1, 0.25 * size / 1e6), size


def test_the_table_lists_the_extras():
    shown = re.findall(r"^\| `(\w+)` \| .+ \|$", PACKAGES, flags=re.MULTILINE)
    assert sorted(shown) == sorted(PROJECTS["diffsynth-core"]["optional-dependencies"])
    assert not any("optional-dependencies" in PROJECTS[name] for name in PROJECTS if name != "diffsynth-core")


def test_the_smallest_versions_are_those_of_the_packages():
    assert {project["requires-python"] for project in PROJECTS.values()} == {">=3.11"}
    (torch,) = (line for line in PROJECTS["diffsynth-core"]["dependencies"] if line.startswith("torch"))
    assert torch.startswith("torch>=2.11,")
    assert "requires Python 3.11 or later and PyTorch 2.11 or later" in PAGE
