"""The scripts in `examples/z_image` run on the tiny hub at small sizes, and name every Z-Image model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffsynth.core.loader.save import save_checkpoint
from diffsynth.testing import tiny_hub
from diffsynth_zimage.config import TINY_CONTROLNET
from diffsynth_zimage.controlnet import ZImageControlNet
from diffsynth_zimage.plugin import TINY
from example_scripts import check_names, loaded, run, text_of

SCRIPTS = ("controlnet", "edit", "inpainting", "text_to_image")
CONTROLNET = "PAI/Z-Image-Turbo-Fun-Controlnet-Union-2.1"


def test_every_model_has_its_example() -> None:
    check_names("z_image", SCRIPTS, ("z-image",))


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, [loaded("z_image", script) for script in SCRIPTS])
    network = {name: TINY["dit"][name] for name in ("dim", "n_heads", "n_kv_heads")}
    config = replace(TINY_CONTROLNET, **network)
    path = root / CONTROLNET / "Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps.safetensors"
    assert CONTROLNET in text_of("z_image", "controlnet")
    path.parent.mkdir(parents=True)
    names = {"architecture": "z_image_controlnet", "layout": "z_image_controlnet"}
    save_checkpoint(ZImageControlNet(config), path, config=config, **names)
    return root


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(script, hub, tmp_path, monkeypatch) -> None:
    run("z_image", script, hub, tmp_path, monkeypatch)
