"""Scripts of `examples/<family>`: the models that they name, and runs of them on a tiny hub at small sizes."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import diffsynth
from diffsynth import registry
from row_harness import Harness, write_data_set

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 50
"""Steps of a script that become one step here; `tests/rows` run more steps of the same calls."""


def text_of(family: str, script: str) -> str:
    return (EXAMPLES / family / f"{script}.py").read_text(encoding="utf-8")


def scripts_of(family: str) -> set[str]:
    return {file.stem for file in (EXAMPLES / family).glob("*.py")}


def models_of(family: str, script: str) -> list[str]:
    """Return the model names with which lines of a script's docstring begin."""
    known = {record.name for record in registry.list()}
    lines = ast.get_docstring(ast.parse(text_of(family, script))).splitlines()
    return [line.split()[0] for line in lines if line.split() and line.split()[0] in known]


def loaded(family: str, script: str) -> str:
    """Return the name of the model that a script loads."""
    return re.search(r'diffsynth\.load\("(.+?)"', text_of(family, script))[1]


def check_names(family: str, scripts: Iterable[str], registered: Iterable[str]) -> None:
    """Assert that a folder holds these scripts, and that each model of these registered families is named once."""
    assert scripts_of(family) == set(scripts)
    named = [model for script in scripts for model in models_of(family, script)]
    assert sorted(named) == sorted(record.name for record in registry.list() if record.family in registered)


def run(family: str, script: str, hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script on the CPU in `folder`, and assert that each of its calls wrote an image of its size, or each of
    its layers.
    """
    text = text_of(family, script)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setattr(diffsynth, "load", functools.partial(diffsynth.load, device="cpu", torch_dtype=torch.float32))
    given = re.findall(r'Image\.open\("(.+?)"\)', text)
    write_data_set("", local_dir=str(folder), allow_file_pattern=given)
    calls = Harness(monkeypatch, folder, steps=STEPS).run(text)
    written = {file.name for file in folder.iterdir()} - set(given)
    outputs = [call.output if isinstance(call.output, list) else [call.output] for call in calls]
    assert len(written) == sum(map(len, outputs)) > 0
    for call, images in zip(calls, outputs, strict=True):
        defaults = call.pipe.__signature__.parameters
        sides = (call.arguments.get(side, defaults[side].default) // 16 for side in ("width", "height"))
        assert {image.size for image in images} == {tuple(-(-side // 16) * 16 for side in sides)}
