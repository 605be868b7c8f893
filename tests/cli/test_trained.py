import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffsynth
from diffsynth import provenance, registry
from diffsynth.cli.group import program
from diffsynth.cli.output import UserError
from diffsynth.cli.trained import trained_weights
from diffsynth_train.config import Recipe, parse_section
from diffsynth_train.loop import train

CALL = ("z-image-nano", "a red apple", "-o", "a.png", "--seed", 5, "--steps", 1)
ON_CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train z-image-nano's network for two steps, of which each has a checkpoint; return the run's folder."""
    work = tmp_path_factory.mktemp("training")
    Image.new("RGB", (32, 32), "red").save(work / "red.png")
    (work / "metadata.csv").write_text("image,prompt\nred.png,red\n")
    sources = registry.get("z-image-nano").components
    recipe = {
        "pipeline": "z-image-nano",
        "objective": {"name": "flow_match"},
        "components": {role: {"source": source, "train": role == "dit"} for role, source in sources.items()},
        "processors": dict(registry.get("z-image-nano").processors),
        "data": {"manifest": str(work / "metadata.csv"), "height": 32, "width": 32},
        "optimizer": {"learning_rate": 1e-2},
        "ema": {"decay": 0.9},
        "loop": {"steps": 2, "precision": "fp32", "save_every": 1},
        "output": {"folder": str(work / "run"), "dtype": "float32"},
    }
    train(parse_section(Recipe, recipe, where=""))
    return work / "run"


@pytest.fixture
def nano():
    return registry.get("z-image-nano")


def rewritten(file, path, **metadata):
    """Write a weight file again with other metadata, of which None is left out; return the new path."""
    with safe_open(file, "pt") as opened:
        notes = {key.replace(".", "_"): value for key, value in opened.metadata().items()} | metadata
    kept = {key.replace("diffsynth_", "diffsynth."): value for key, value in notes.items() if value is not None}
    save_file(load_file(file), path, metadata=kept)
    return path


def test_the_trained_result_from_the_command_line(folder, monkeypatch, tmp_path):
    """Component and size are those of the metadata; a replay finds the weights again."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(program, ["generate", *map(str, CALL), *ON_CPU, "--weights", str(folder)])
    assert result.exit_code == 0, result.output
    assert f"weights: dit {folder / 'dit.safetensors'}, " in result.stderr
    assert "(after 2 steps, averaged, 32x32 pixels)" in result.stderr
    arguments = {"seed": 5, "num_inference_steps": 1, "height": 32, "width": 32}
    options = {"device": "cpu", "torch_dtype": torch.float32}
    pipe = diffsynth.load("z-image-nano", components={"dit": str(folder / "dit.safetensors")}, **options)
    assert Image.open("a.png").tobytes() == pipe("a red apple", **arguments).tobytes()
    untrained = diffsynth.load("z-image-nano", **options)("a red apple", **arguments)
    assert np.abs(np.subtract(Image.open("a.png"), untrained, dtype=np.int16)).max() > 0
    assert provenance.read("a.png")["components"]["dit"] == str(folder / "dit.safetensors")
    replayed = CliRunner().invoke(program, ["replay", "a.png"])
    assert replayed.exit_code == 0, replayed.output


def test_of_a_folder_the_weights_with_the_most_steps(folder, nano, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    for expected in ("dit.safetensors", "step-0000002/dit.safetensors", "step-0000001/dit.safetensors"):
        found = trained_weights(nano, copy)
        assert found.components["dit"] == str(copy / expected)
        assert found.steps == (1 if "1" in expected else 2)
        assert trained_weights(nano, copy / expected).components["dit"] == str(copy / expected)
        assert found.size == {"height": 32, "width": 32}
        (copy / expected).unlink()
    with pytest.raises(UserError, match=r"run: the folder has no \.safetensors files; expected that of"):
        trained_weights(nano, copy)


def test_a_file_of_another_name_and_without_a_recipe(folder, nano, tmp_path):
    file = rewritten(folder / "dit.safetensors", tmp_path / "mine.safetensors", diffsynth_recipe=None)
    found = trained_weights(nano, file)
    assert (found.components, found.size, found.averaged) == ({"dit": str(file)}, {}, False)
    assert str(found) == f"weights: dit {file} (after 2 steps)"


def test_what_is_refused(folder, nano, tmp_path):
    dit = folder / "dit.safetensors"
    with safe_open(dit, "pt") as opened:
        recipe = json.loads(opened.metadata()["diffsynth.recipe"])
    other = json.dumps({**recipe, "pipeline": "diffsynth_wan.pipeline:WanPipeline"})
    moved = json.dumps({**recipe, "components": {"vae": {"source": "gone/vae.safetensors"}}})
    for name, metadata, message in (
        (
            "a",
            {"diffsynth_architecture": None},
            "it does not say its architecture, so diffsynth train did not",
        ),
        ("b", {"diffsynth_architecture": "z_image_did"}, "no component of that kind; did you mean 'z_image_dit'?"),
        ("c", {"diffsynth_recipe": other}, "trained for diffsynth_wan.pipeline:WanPipeline, and z-image-nano is a"),
        ("d", {"diffsynth_recipe": moved}, "vae from gone/vae.safetensors, which is not there; give --component vae="),
    ):
        file = rewritten(dit, tmp_path / f"{name}.safetensors", **metadata)
        with pytest.raises(UserError) as caught:
            trained_weights(nano, file)
        assert message in str(caught.value)
    for path, message in (
        (tmp_path / "none", "there is no such file or folder"),
        (folder / "loss.csv", "expected a .s"),
    ):
        with pytest.raises(UserError, match=message):
            trained_weights(nano, path)
