"""Code blocks of pages without a test of their own run as they stand, with tiny models of the same names."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

import diffsynth
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.core.data.media_writer import save_audio
from diffsynth.core.lora import save_lora
from diffsynth.testing import tiny_hub
from diffsynth.utils.data import save_video_with_audio
from documented import blocks
from processes import run_together
from qwen_image_files import write_lora

ROOT = Path(__file__).parents[2]
SMALL = {"height": 32, "width": 32, "num_inference_steps": 1}
RUN = {
    "README.md": [0],
    "packages/diffsynth-core/README.md": [0],
    "packages/diffsynth-flux/README.md": [0],
    "packages/diffsynth-qwen-image/README.md": [0],
    "packages/diffsynth-wan/README.md": [0],
    "packages/diffsynth-zimage/README.md": [0],
    "docs/api/attention.md": [0, 1, 2],
    "docs/api/data.md": [0, 1, 2, 3],
    "docs/api/device.md": [0],
    "docs/api/gradient.md": [0],
    "docs/api/loader.md": [0, 1, 2, 3, 4, 5],
    "docs/api/vram.md": [0, 1, 2],
    "docs/models/flux-1.md": [0, 1, 2],
    "docs/models/flux-2.md": [0],
    "docs/models/wan.md": [0],
    "docs/models/qwen-image.md": [0, 1, 2, 3, 4, 5, 6, 8],
    "docs/models/z-image.md": [0],
    "docs/compile.md": [0, 1],
    "docs/conformance.md": [1, 2],
    "docs/loading.md": [1],
    "docs/loading-speed.md": [0],
    "docs/lora.md": [0, 1, 2, 3, 4, 5],
    "docs/plan.md": [0],
    "docs/quantization.md": [0, 1],
    "docs/step-caches.md": [0],
    "docs/tiny-hub.md": [0, 1],
    "docs/video.md": [0, 1, 2],
}
"""Page -> which of its Python blocks run."""

EXEMPT = {
    "docs/conformance.md": {
        0: "the test of a plugin that is not installed; tests/testing/test_suite.py runs such a one"
    },
    "docs/loading.md": {0: "needs gguf, which is no dependency"},
    "docs/plan.md": {1: "a line of a method, with the reader's own names"},
    "docs/models/qwen-image.md": {7: "networks of 3 B and more; tests/rows/test_qwen_image.py runs them tiny"},
    "docs/models/z-image.md": dict.fromkeys(
        (2, 3), "networks of 1.6 B and more; tests/rows/test_z_image.py runs them tiny"
    ),
    "docs/models/wan.md": {
        1: "241 frames, tests/wan/test_windows.py has fewer",
        2: "clips of 1280 x 720 of the reader",
    },
}
"""Page -> which of its Python blocks do not run, and why."""

ELSEWHERE = {
    "docs/attention.md": "test_attention_page.py",
    "docs/coming-from-diffsynth-studio.md": "test_coming_from.py",
    "docs/faq.md": "test_faq_page.py",
    "docs/guidance.md": "test_guidance_page.py",
    "docs/hooks/": "test_hooks.py",
    "docs/host-apps.md": "test_host_apps.py",
    "docs/inputs.md": "test_inputs_page.py",
    "docs/integrate/": "test_integrate_pages.py",
    "docs/models/flux-1.md": "test_docs.py",
    "docs/models/flux-2.md": "test_docs.py",
    "docs/models/z-image.md": "test_docs.py",
    "docs/other-models.md": "test_other_models_page.py",
    "docs/predictions.md": "test_predictions_page.py",
    "docs/principles.md": "test_principles_page.py",
    "docs/python.md": "test_python_page.py",
    "docs/solvers.md": "test_solvers_page.py",
    "docs/vram.md": "test_vram_page.py",
    "docs/write-a-plugin.md": "test_write_a_plugin.py",
}
"""Page, or folder of pages -> the test beside this one that runs its other Python blocks."""


MODELS = (
    "z-image-turbo",
    "wan2.1-t2v-1.3b",
    "flux.1-dev",
    "flux.1-dev-ip-adapter",
    "flux.2-klein-4b",
    "qwen-image",
)
"""Models that the blocks load."""

LORA = {
    f"layers.0.attention.to_q.lora_{side}.weight": torch.randn(*shape)
    for side, shape in (("A", (4, 256)), ("B", (256, 4)))
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_hub(folder, MODELS)
    return folder


@pytest.fixture
def small_models(hub, monkeypatch, tmp_path):
    """The models of the hub, whose calls are small unless they say otherwise, and the files that the blocks name."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.chdir(tmp_path)
    load = diffsynth.load

    def load_small(name, **options):
        pipe = load(name, **{"device": "cpu", "torch_dtype": torch.float32, **options})
        frames = {"num_frames": 5} if "num_frames" in pipe.__signature__.parameters else {}
        return pipe.named(name, {**SMALL, **frames})

    monkeypatch.setattr(diffsynth, "load", load_small)
    return load_small


def python_blocks(page: str) -> list[str]:
    return [text for _, kind, text in blocks((ROOT / page).read_text(encoding="utf-8")) if kind == "python"]


@pytest.mark.parametrize("page", RUN)
@mock.patch.dict(BACKENDS)
def test_the_blocks_of_a_page_run(page, small_models, hub, monkeypatch):
    python = python_blocks(page)
    names = {"__name__": "block"}
    if page == "docs/step-caches.md":
        names["pipe"] = small_models("z-image-nano")
    if page == "docs/compile.md":
        names |= {"x": torch.ones(2, 8), "weight": torch.ones(8)}
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no C++ compiler
    if page == "docs/loading-speed.md":
        transformer = sorted((hub / "Tongyi-MAI/Z-Image-Turbo/transformer").glob("*.safetensors"))
        names |= {"files": transformer, "device": "cpu", "a_tensor_of_yours": torch.empty(256, 256)}
    if page == "docs/lora.md":
        names["module"] = small_models("z-image-turbo").dit
        for file in ("style", "first", "second"):
            save_lora(LORA, f"{file}.safetensors")
        write_lora(hub, "lightx2v/Qwen-Image-Lightning:Qwen-Image-Lightning-4steps-V1.0.safetensors", seed=0)
    if page == "docs/plan.md":  # of a pipeline on an accelerator, which a plan does not need
        names["pipe"] = SimpleNamespace(plan=functools.partial(small_models("z-image-nano").plan, device="cuda"))
    if page == "docs/video.md":
        names["frames"] = [Image.new("RGB", (64, 48))] * 5
        names |= {
            "vae": small_models("wan2.1-t2v-1.3b").vae,
            "latents": torch.zeros(1, 16, 2, 2, 2),
        }
        save_audio(torch.zeros(1, 800), "dance.wav", 8000)
        save_video_with_audio(names["frames"], "dance.mp4", "dance.wav", fps=15)
    for index in RUN[page]:
        exec(python[index], names)
    if page == "README.md":
        assert (names["image"].size, len(names["four"]), len(names["frames"])) == ((32, 32), 4, 5)
    if page == "docs/loading.md":
        assert [path.is_file() for path in names["paths"]] == [True]


def test_the_script_of_several_processes_runs(small_models):
    """With two processes on the CPU; the block ends by saving a clip in the main process."""

    def work(rank: int) -> int:
        (script,) = python_blocks("docs/parallel.md")
        names = {"__name__": "block"}
        exec(script, names)
        assert names["pipe"].mesh.is_main_process == (rank == 0)
        return len(names["video"])

    assert run_together(2, work) == [5, 5]
    assert Path("cat.mp4").stat().st_size


def test_no_block_is_exempt_without_a_reason():
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))]
    pages = [page for page in pages if python_blocks(page)]
    assert len(pages) >= 40
    for page in pages:
        known = {*RUN.get(page, ()), *EXEMPT.get(page, ())}
        test = next((test for start, test in ELSEWHERE.items() if page.startswith(start)), None)
        if test is None and page != "docs/parallel.md":
            assert known == set(range(len(python_blocks(page)))), page
        elif test is not None:
            name = page.removeprefix("docs/").removesuffix(".md").rpartition("/")[2]
            assert page.startswith("docs/hooks/") or name in (Path(__file__).parent / test).read_text(), page
