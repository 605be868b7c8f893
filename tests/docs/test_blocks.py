"""Code blocks of pages without a test of their own run as they stand, with tiny models of the same names."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import diffsynth
from diffsynth.core.data.media_writer import save_audio
from diffsynth.core.lora import save_lora
from diffsynth.testing import tiny_hub
from diffsynth.utils.data import save_video_with_audio
from documented import blocks

ROOT = Path(__file__).parents[2]
SMALL = {"height": 32, "width": 32, "num_inference_steps": 1}
RUN = {
    "README.md": [0],
    "docs/models/z-image.md": [0],
    "docs/compile.md": [1],
    "docs/loading.md": [1],
    "docs/lora.md": [0, 1, 2],
    "docs/plan.md": [0],
    "docs/step-caches.md": [0],
    "docs/video.md": [0, 1],
}
"""Page -> which of its Python blocks run."""


LORA = {
    f"layers.0.attention.to_q.lora_{side}.weight": torch.randn(*shape)
    for side, shape in (("A", (4, 256)), ("B", (256, 4)))
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_hub(folder, ["z-image-turbo", "wan2.1-t2v-1.3b"])
    return folder


@pytest.fixture
def small_models(hub, monkeypatch, tmp_path):
    """The models of the hub, whose calls are small unless they say otherwise, and the files that the blocks name."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.chdir(tmp_path)
    load = diffsynth.load

    def load_small(name, **options):
        pipe = load(name, device="cpu", **options)
        frames = {"num_frames": 5} if "num_frames" in pipe.__signature__.parameters else {}
        return pipe.named(name, {**SMALL, **frames})

    monkeypatch.setattr(diffsynth, "load", load_small)
    return load_small


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page, small_models):
    python = [text for _, language, text in blocks((ROOT / page).read_text(encoding="utf-8")) if language == "python"]
    names = {"__name__": "block"}
    if page == "docs/step-caches.md":
        names["pipe"] = small_models("z-image-nano")
    if page == "docs/compile.md":
        names |= {"x": torch.ones(2, 8), "weight": torch.ones(8)}
    if page == "docs/lora.md":
        names["module"] = small_models("z-image-turbo").dit
        for file in ("style", "first", "second"):
            save_lora(LORA, f"{file}.safetensors")
    if page == "docs/plan.md":  # of a pipeline on an accelerator, which a plan does not need
        names["pipe"] = SimpleNamespace(plan=functools.partial(small_models("z-image-nano").plan, device="cuda"))
    if page == "docs/video.md":
        names["frames"] = [Image.new("RGB", (64, 48))] * 5
        save_audio(torch.zeros(1, 800), "dance.wav", 8000)
        save_video_with_audio(names["frames"], "dance.mp4", "dance.wav", fps=15)
    for index in RUN[page]:
        exec(python[index], names)
    if page == "README.md":
        assert (names["image"].size, len(names["four"]), len(names["frames"])) == ((32, 32), 4, 5)
    if page == "docs/loading.md":
        assert [path.is_file() for path in names["paths"]] == [True]
