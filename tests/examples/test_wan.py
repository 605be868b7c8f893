"""The scripts in `examples/wan` run on the tiny hub at small sizes, and name every Wan model."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import torch

import diffsynth
from diffsynth import registry
from diffsynth.core.data.media import count_frames, frame_rate_of
from diffsynth.testing import tiny_hub
from row_harness import Harness, write_data_set

FOLDER = Path(__file__).parents[2] / "examples" / "wan"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py"))
STEPS = 50
"""Steps of a script that become one step here; `tests/rows` run more steps of the same calls."""

FRAMES = {81: 9, 49: 5, 33: 5, 121: 13}
"""Frames of a call in the script -> frames with the harness; the output of Animate has 4 fewer."""


def text_of(script: str) -> str:
    return (FOLDER / f"{script}.py").read_text(encoding="utf-8")


def models_of(script: str) -> list[str]:
    """Return the model names in a script's docstring: first words of lines that look like one."""
    return re.findall(
        r"^([a-z][a-z\d.-]*\d[a-z\d.-]*|krea-\S+)(?= {2,}|$)", ast.get_docstring(ast.parse(text_of(script))), re.M
    )


def opened(script: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(text_of(script))) if isinstance(node, ast.Call)]
    return [call.args[0].value for call in calls if ast.unparse(call.func) in ("VideoData", "Image.open")]


def test_every_model_has_its_example():
    named = [model for script in SCRIPTS for model in models_of(script)]
    known = {record.name for record in registry.list() if record.family == "wan"}
    assert known == set(named)
    assert all(re.search(r'diffsynth\.load\("(.+?)"\)', text_of(script))[1] in models_of(script) for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(script, tmp_path, tmp_path_factory, monkeypatch):
    hub = tmp_path_factory.mktemp("hub")
    model = re.search(r'diffsynth\.load\("(.+?)"\)', text_of(script))[1]
    tiny_hub(hub, model)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setattr(diffsynth, "load", functools.partial(diffsynth.load, device="cpu", torch_dtype=torch.float32))
    given = opened(script)
    write_data_set("", local_dir=str(tmp_path), allow_file_pattern=given)
    calls = Harness(monkeypatch, tmp_path, steps=STEPS).run(text_of(script))
    written = sorted(
        (file for file in tmp_path.glob("*.mp4") if file.name not in given), key=lambda file: file.stat().st_mtime_ns
    )
    assert len(written) == len(calls) > 0
    for call, file in zip(calls, written, strict=True):
        usual = call.pipe.__signature__.parameters["num_frames"].default
        frames = FRAMES[call.arguments.get("num_frames", usual)] - 4 * ("animate_pose_video" in call.arguments)
        assert (len(call.output), count_frames(file), frame_rate_of(file)) == (frames, frames, registry.get(model).fps)
