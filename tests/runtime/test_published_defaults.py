"""Defaults of a model whose files are loaded without its name: a call that leaves them to the pipeline says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffsynth.runtime.published_defaults import model_of_files
from diffsynth_qwen_image import QwenImagePipeline
from diffsynth_qwen_image.features import edit
from diffsynth_zimage import ZImagePipeline
from qwen_image_oracles import SIZE, tiny_pipelines

FILE = "transformer/diffusion_pytorch_model.safetensors"
MODEL = "Qwen/Qwen-Image-Edit-2511"


@pytest.mark.parametrize(
    "root", ["models/{}", "/data/{}@v1", "cache/hub/models--Qwen--Qwen-Image-Edit-2511/snapshots/c"]
)
def test_files_tell_their_model_by_their_folders(root):
    file = Path(root.format(MODEL)) / FILE
    assert model_of_files(QwenImagePipeline, [file]).name == "qwen-image-edit-2511"
    assert model_of_files(ZImagePipeline, [file]) is None
    assert model_of_files(QwenImagePipeline, [Path("mine") / FILE, Path(f"models/{MODEL}-my") / FILE]) is None


def test_files_of_two_models():
    files = [Path("models") / name / FILE for name in (MODEL, "Qwen/Qwen-Image")]
    assert model_of_files(QwenImagePipeline, files) is None


@pytest.fixture(scope="module")
def parts():
    return tiny_pipelines()[0].components


def said(parts, caplog, arguments, *, files=(Path("models") / MODEL / FILE,), name=None):
    pipe = QwenImagePipeline(parts, device="cpu", torch_dtype=torch.float32, component_files={"dit": list(files)})
    if name is not None:
        pipe.named(name, {"zero_cond_t": True})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipe("a", num_inference_steps=1, cfg_scale=1.0, output_type="latents", **SIZE, **arguments)
    return [record.getMessage() for record in caplog.records if "the files are those of" in record.getMessage()]


def test_a_call_says_what_the_model_has_in_place_of_a_default(parts, caplog, monkeypatch):
    monkeypatch.setattr(edit, "AREA", 64 * 64)
    one = {"edit_image": Image.new("RGB", (64, 64)), "seed": 0}
    (text,) = said(parts, caplog, one)
    assert text == (
        "zero_cond_t is False, the default of the pipeline, but the files are those of qwen-image-edit-2511, which has "
        "True: pass zero_cond_t, or load the model by its name"
    )
    assert said(parts, caplog, {"seed": 0}) == []  # nothing reads it
    assert said(parts, caplog, one | {"zero_cond_t": False}) == []
    assert said(parts, caplog, one, name="qwen-image-edit-2511") == []
    assert said(parts, caplog, one, files=[Path("models/Qwen/Qwen-Image-Edit-2509") / FILE]) == []
