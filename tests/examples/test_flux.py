"""The scripts in `examples/flux` run on the tiny hub at small sizes, and name every FLUX model and row."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import torch

import diffsynth
from diffsynth import registry
from diffsynth.testing import tiny_hub
from diffsynth_flux.flux2.features import edit
from flux_controlnets import write_controlnets
from row_harness import Harness, write_data_set
from row_scripts import read_rows

FOLDER = Path(__file__).parents[2] / "examples" / "flux"
STEPS = 50
"""Steps of a script that become one step here; `tests/rows` run more steps of the same calls."""

ROWS = {
    "text_to_image": ["flux/FLUX.1-dev", "flux/FLUX.1-Krea-dev"],
    "kontext": ["flux/FLUX.1-Kontext-dev"],
    "fill": ["flux/FLUX.1-Fill-dev"],
    "control": [],
    "redux": ["flux/FLUX.1-Redux-dev"],
    "controlnet_union": ["flux/FLUX.1-dev-Controlnet-Union-alpha"],
    "controlnet_inpainting": ["flux/FLUX.1-dev-Controlnet-Inpainting-Beta"],
    "controlnet_upscaler": ["flux/FLUX.1-dev-Controlnet-Upscaler"],
    "ip_adapter": ["flux/FLUX.1-dev-IP-Adapter"],
    "flux2_dev": ["flux2/FLUX.2-dev"],
    "flux2_klein": ["flux2/FLUX.2-klein-4B", "flux2/FLUX.2-klein-9B"],
    "flux2_klein_base": ["flux2/FLUX.2-klein-base-4B", "flux2/FLUX.2-klein-base-9B"],
}
"""Script -> the rows that it is the example of; DiffSynth-Studio has none for Depth and Canny."""


def text_of(script: str) -> str:
    return (FOLDER / f"{script}.py").read_text(encoding="utf-8")


def models_of(script: str) -> list[str]:
    """Return the model names in a script's docstring: first words of lines that look like one."""
    return re.findall(r"^(flux\.[\w.-]+)(?= {2,}|$)", ast.get_docstring(ast.parse(text_of(script))), re.M)


def test_every_model_and_row_has_its_example() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(ROWS)
    named = [model for script in ROWS for model in models_of(script)]
    assert sorted(named) == sorted(record.name for record in registry.list() if record.family in ("flux-1", "flux-2"))
    rows = read_rows("flux") | read_rows("flux2")
    for script, names in ROWS.items():
        for name in names:
            files = {file.get("model_id") for file in rows[name]["files"]}
            text = text_of(script).lower()
            assert any(repository.lower() in text for repository in files) or name.lower().split("/")[1] in text


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, [loaded(script) for script in ROWS])
    write_controlnets(root)
    return root


def loaded(script: str) -> str:
    return re.search(r'diffsynth\.load\("(.+?)"', text_of(script))[1]


@pytest.mark.parametrize("script", ROWS)
def test_it_runs(script, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setattr(diffsynth, "load", functools.partial(diffsynth.load, device="cpu", torch_dtype=torch.float32))
    monkeypatch.setattr(edit, "AREA", 64 * 64)
    given = re.findall(r'Image\.open\("(.+?)"\)', text_of(script))
    write_data_set("", local_dir=str(tmp_path), allow_file_pattern=given)
    calls = Harness(monkeypatch, tmp_path, steps=STEPS).run(text_of(script))
    written = {file.name for file in tmp_path.iterdir()} - set(given)
    assert len(written) == len(calls) > 0
    for call in calls:
        sides = (call.arguments.get(side, 1024) // 16 for side in ("width", "height"))
        assert call.output.size == tuple(-(-side // 16) * 16 for side in sides)
