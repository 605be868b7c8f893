"""`docs/architecture.md`: the files and names that it lists are there."""

import importlib
import re

import pytest

from source_tree import ROOT, SOURCES

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CORE = SOURCES["diffsynth"].parent
FILES = sorted(set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", PAGE)))
ROOMS = re.findall(
    r"^\| `([a-z_/]+)`(?:, `([a-z_/]+)`)? \| .+ \| (.+) \|$", PAGE.split("## The rooms")[1], re.MULTILINE
)


@pytest.mark.parametrize("file", FILES)
def test_every_file_exists(file):
    places = (
        CORE / file,
        SOURCES["diffsynth_train"].parent.parent / file,
        ROOT / file,
        ROOT / "tests" / "contracts" / file,
    )
    assert any(place.exists() for place in places), f"docs/architecture.md names {file}"


@pytest.mark.parametrize("room", [name for row in ROOMS for name in row[:2] if name], ids=str)
def test_every_room_exists(room):
    assert (CORE / room).is_dir() or (CORE / f"{room}.py").exists() or room == "diffsynth"


@pytest.mark.parametrize(
    "row",
    [row for row in ROOMS if row[0].startswith("core/") or row[0] in ("diffsynth", "testing")],
    ids=lambda row: row[0],
)
def test_the_names_of_a_room_are_there(row):
    module = "diffsynth" if row[0] == "diffsynth" else f"diffsynth.{row[0].replace('/', '.')}"
    for name in re.findall(r"`([A-Za-z_.]+)`", row[2]):
        if name.startswith(("diffsynth.", "pipe.")):
            continue
        inside, _, attribute = name.rpartition(".")
        found = importlib.import_module(f"{module}.{inside}" if inside else module)
        assert hasattr(found, attribute), f"docs/architecture.md names {name} of {module}"
