"""FLUX.1 examples of DiffSynth-Studio run on the tiny hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from diffsynth.errors import NoFiles
from diffsynth.testing import tiny_hub
from row_harness import Harness
from row_scripts import read_rows, script

ROWS = read_rows("flux")
PROMPT = '"CG, masterpiece, best quality, solo, long hair, wavy hair, silver hair, blue eyes, blue dress"'
COMMON = {"prompt": PROMPT, "seed": "42"}
GUIDED = COMMON | {"negative_prompt": '"worst quality, low quality"', "cfg_scale": "2", "num_inference_steps": "50"}

RUN = {
    "flux/FLUX.1-dev": GUIDED,
    "flux/FLUX.1-Krea-dev": GUIDED | {"embedded_guidance": "4.5"},
}
"""Row -> arguments of its call, with the values of DiffSynth-Studio's table."""

DEFAULTS = {"rand_device", "height", "width"}
"""Arguments whose values in the table are our defaults."""

_SIZE = {"height": "1024", "width": "1024"}
MISSING = {
    "flux/FLEX.2-preview": "ostris/Flex.2-preview",
    "flux/FLUX.1-Fill-dev": "black-forest-labs/FLUX.1-Fill-dev",
    "flux/FLUX.1-Kontext-dev": "black-forest-labs/FLUX.1-Kontext-dev",
    "flux/FLUX.1-Redux-dev": "black-forest-labs/FLUX.1-Redux-dev",
    "flux/FLUX.1-dev-AttriCtrl": "DiffSynth-Studio/AttriCtrl-FLUX.1-Dev",
    "flux/FLUX.1-dev-Controlnet-Inpainting-Beta": "FLUX.1-dev-Controlnet-Inpainting-Beta",
    "flux/FLUX.1-dev-Controlnet-Union-alpha": "FLUX.1-dev-Controlnet-Union-alpha",
    "flux/FLUX.1-dev-Controlnet-Upscaler": "Flux.1-dev-Controlnet-Upscaler",
    "flux/FLUX.1-dev-EliGen": "DiffSynth-Studio/Eligen",
    "flux/FLUX.1-dev-IP-Adapter": "InstantX/FLUX.1-dev-IP-Adapter",
    "flux/FLUX.1-dev-InfiniteYou": "ByteDance/InfiniteYou",
    "flux/FLUX.1-dev-LoRA-Encoder": "VoidOc/flux_animal_forest1",
    "flux/FLUX.1-dev-LoRA-Fusion": "cancel13/cxsk",
    "flux/FLUX.1-dev-Timestep-LoRA": "DiffSynth-Studio/MultiAlign-FLUX.1-dev",
    "flux/Insert-Anything": "HuanJue/Insert-Anything",
    "flux/Nexus-Gen-Editing": "DiffSynth-Studio/Nexus-GenV2",
    "flux/Nexus-Gen-Generation": "no source",
    "flux/Step1X-Edit": "Qwen/Qwen2.5-VL-7B-Instruct",
}
"""Row -> the name that the error must contain."""

UNKNOWN = {
    name
    for row in MISSING
    for name in ROWS[row]["call"]
    if name.startswith(("flex_", "value_", "eligen_", "infinityou_", "lora_encoder_", "insert_anything_", "nexus_gen_"))
}
"""Arguments of the unsupported components."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, ["flux.1-dev", "flux.1-krea-dev"])
    return root


@pytest.fixture
def harness(hub, monkeypatch, tmp_path) -> Harness:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return Harness(monkeypatch, tmp_path, steps=20, precise=True)


def differs(one: Image.Image, other: Image.Image) -> bool:
    return one.size != other.size or ImageChops.difference(one, other).getbbox() is not None


def test_every_row_is_here():
    assert len(ROWS) == 20
    assert set(ROWS) == {*RUN, *MISSING}


@pytest.mark.parametrize("name", RUN)
def test_a_row_runs_and_every_argument_of_it_counts(name, harness):
    (call,) = harness.run(script(ROWS[name], RUN[name]))
    assert isinstance(call.output, Image.Image)
    assert call.output.size == (call.arguments.get("width", 1024) // 16, call.arguments.get("height", 1024) // 16)
    assert (harness.folder / f"image_{name.rpartition('/')[2]}.jpg").is_file()
    assert not differs(call.again(), call.output)
    assert set(call.arguments) == set(ROWS[name]["call"])
    changed = [argument for argument in call.arguments if not call.is_default(argument)]
    assert set(changed) == set(ROWS[name]["call"]) - DEFAULTS
    for argument in changed:
        assert differs(call.again(**{argument: ...}), call.output), f"{argument} changes nothing"


def test_the_same_row_under_a_memory_limit(harness):
    name = "flux/FLUX.1-dev"
    (call,) = harness.run(script(ROWS[name], RUN[name], vram_limit=True))
    (unlimited,) = harness.run(script(ROWS[name], RUN[name]))
    assert not differs(call.output, unlimited.output)


@pytest.mark.parametrize("name", MISSING)
def test_a_row_whose_part_is_missing_says_so(name, harness):
    values = {**dict.fromkeys(ROWS[name]["call"], "None"), **COMMON, **_SIZE}
    with pytest.raises((NoFiles, ValueError), match=MISSING[name]):
        harness.run(script(ROWS[name], values))
    assert harness.calls == []


def test_arguments_of_missing_parts_are_not_ignored(harness):
    row = {**ROWS["flux/FLUX.1-dev"], "call": ["prompt"]}
    (call,) = harness.run(script(row, COMMON))
    for argument in sorted(UNKNOWN):
        with pytest.raises(TypeError, match=argument):
            call.again(**{argument: None})
