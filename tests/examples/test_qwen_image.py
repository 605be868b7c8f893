"""The scripts in `examples/qwen_image` run on the tiny hub at small sizes, and name every Qwen-Image model."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffsynth.testing import tiny_hub
from diffsynth_qwen_image.features import edit
from example_scripts import check_names, loaded, run
from qwen_image_files import write_controlnets, write_image_to_lora, write_lora

SCRIPTS = (
    *("context", "controlnet", "controlnet_union", "inpaint_controlnet"),
    *("edit", "edit_several", "entities", "image_to_lora", "layers", "text_to_image"),
)


def test_every_model_has_its_example() -> None:
    check_names("qwen_image", SCRIPTS, ("qwen-image",))


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, [loaded("qwen_image", script) for script in SCRIPTS])
    write_controlnets(root)
    for model in ("Qwen-Image-In-Context-Control-Union", "Qwen-Image-EliGen-V2"):
        write_lora(root, f"DiffSynth-Studio/{model}:model.safetensors", seed=0)
    write_image_to_lora(root)
    return root


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(script, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(edit, "AREA", 64 * 64)
    monkeypatch.setattr(edit, "LISTED_AREA", 64 * 64)
    run("qwen_image", script, hub, tmp_path, monkeypatch)
