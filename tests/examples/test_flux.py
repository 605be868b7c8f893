"""The scripts in `examples/flux` run on the tiny hub at small sizes, and name every FLUX model and row."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffsynth.testing import tiny_hub
from diffsynth_flux.flux2.features import edit
from example_scripts import check_names, loaded, run, text_of
from flux_controlnets import write_controlnets
from row_scripts import read_rows

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


def test_every_model_and_row_has_its_example() -> None:
    check_names("flux", ROWS, ("flux-1", "flux-2"))
    rows = read_rows("flux") | read_rows("flux2")
    for script, names in ROWS.items():
        for name in names:
            files = {file.get("model_id") for file in rows[name]["files"]}
            text = text_of("flux", script).lower()
            assert any(repository.lower() in text for repository in files) or name.lower().split("/")[1] in text


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, [loaded("flux", script) for script in ROWS])
    write_controlnets(root)
    return root


@pytest.mark.parametrize("script", ROWS)
def test_it_runs(script, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(edit, "AREA", 64 * 64)
    run("flux", script, hub, tmp_path, monkeypatch)
