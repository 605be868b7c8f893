"""FLUX.1 examples of DiffSynth-Studio run on the tiny hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffsynth.errors import NoFiles
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.testing import tiny_hub
from diffsynth_flux.flux1.convert import DIFFSYNTH_STUDIO
from flux_controlnets import write_controlnets
from limited import let_blocks_travel
from row_harness import Harness, check_arguments, check_low_vram, round_weights
from row_scripts import read_rows, script, trained_file
from trained_weights import read_weights, write_full, write_lora

ROWS = read_rows("flux")
PROMPT = '"CG, masterpiece, best quality, solo, long hair, wavy hair, silver hair, blue eyes, blue dress"'
COMMON = {"prompt": PROMPT, "seed": "42"}
GUIDED = COMMON | {"negative_prompt": '"worst quality, low quality"', "cfg_scale": "2", "num_inference_steps": "50"}

_IMAGE = 'Image.linear_gradient("L").resize((80, 64)).convert("RGB")'
_SIZE = {"height": "1024", "width": "1024"}
_CONTROL = COMMON | _SIZE | {"rand_device": '"cuda"'}
RUN = {
    "flux/FLUX.1-dev": GUIDED,
    "flux/FLUX.1-Kontext-dev": COMMON | {"embedded_guidance": "2.5", "kontext_images": _IMAGE},
    "flux/FLUX.1-Fill-dev": COMMON
    | {"height": "1632", "width": "1232", "embedded_guidance": "30.0", "num_inference_steps": "50"}
    | {"flux_fill_image": _IMAGE, "flux_fill_mask": 'Image.linear_gradient("L")'},
    "flux/FLUX.1-Redux-dev": {"embedded_guidance": "2.5", "num_inference_steps": "50", "flux_redux_image": _IMAGE},
    "flux/FLUX.1-dev-Controlnet-Union-alpha": _CONTROL
    | {"controlnet_inputs": f'[ControlNetInput(image={_IMAGE}, scale=0.3, processor_id="canny")]'},
    "flux/FLUX.1-dev-Controlnet-Inpainting-Beta": _CONTROL
    | {"controlnet_inputs": f'[ControlNetInput(image={_IMAGE}, inpaint_mask=Image.linear_gradient("L"), scale=0.9)]'},
    "flux/FLUX.1-dev-Controlnet-Upscaler": _CONTROL
    | {"controlnet_inputs": f"[ControlNetInput(image={_IMAGE}, scale=0.7)]", "input_image": _IMAGE}
    | {"denoising_strength": "0.99", "height": "2048", "width": "2048", "tiled": "True"},
    # The table has a width of 960, which is rounded to that of 1024 in the harness.
    "flux/FLUX.1-dev-IP-Adapter": COMMON
    | {"height": "1280", "width": "768", "ipadapter_images": f"[{_IMAGE}]", "ipadapter_scale": "0.7"},
    "flux/FLUX.1-Krea-dev": GUIDED | {"embedded_guidance": "4.5"},
}
"""Row -> arguments of its call, with the values of DiffSynth-Studio's table."""

NEEDED = {"flux_fill_image", "flux_fill_mask", "input_image"}
"""Arguments without which their network does not run, or the call's `denoising_strength` has nothing to begin with."""

DEFAULTS = {"rand_device", "height", "width"}
"""Arguments whose values in the table are our defaults."""

MISSING = {
    "flux/FLEX.2-preview": "ostris/Flex.2-preview",
    "flux/FLUX.1-dev-AttriCtrl": "DiffSynth-Studio/AttriCtrl-FLUX.1-Dev",
    "flux/FLUX.1-dev-EliGen": "DiffSynth-Studio/Eligen",
    "flux/FLUX.1-dev-InfiniteYou": "ByteDance/InfiniteYou",
    "flux/FLUX.1-dev-LoRA-Encoder": "VoidOc/flux_animal_forest1",
    "flux/FLUX.1-dev-LoRA-Fusion": "cancel13/cxsk",
    "flux/FLUX.1-dev-Timestep-LoRA": "DiffSynth-Studio/MultiAlign-FLUX.1-dev",
    "flux/Insert-Anything": "HuanJue/Insert-Anything",
    "flux/Nexus-Gen-Editing": "takes no 'processor_config'",
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


MODELS = ("dev", "krea-dev", "kontext-dev", "fill-dev", "redux-dev", "dev-ip-adapter")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, [f"flux.1-{name}" for name in MODELS])
    write_controlnets(root)
    round_weights(root, torch.float8_e4m3fn)
    return root


@pytest.fixture
def harness(hub, monkeypatch, tmp_path) -> Harness:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return Harness(monkeypatch, tmp_path, steps=30, precise=True)


def test_every_row_is_here():
    assert len(ROWS) == 20
    assert set(ROWS) == {*RUN, *MISSING}


@pytest.mark.parametrize("name", RUN)
def test_a_row_runs_and_every_argument_of_it_counts(name, harness):
    (call,) = harness.run(script(ROWS[name], RUN[name]))
    assert isinstance(call.output, Image.Image)
    sides = (call.arguments.get(name, 1024) // 16 for name in ("width", "height"))
    assert call.output.size == tuple(-(-side // 16) * 16 for side in sides)
    assert (harness.folder / f"image_{name.rpartition('/')[2]}.jpg").is_file()
    assert set(call.arguments) == set(ROWS[name]["call"])
    changed = [argument for argument in call.arguments if not call.is_default(argument)]
    assert {*changed, *DEFAULTS} >= set(ROWS[name]["call"])
    neutral = {"controlnet_inputs": [without_scale(call.arguments)]}
    refused = check_arguments(call, neutral=neutral, unchanging={"tiled"})  # the image is smaller than a tile
    assert refused == NEEDED & set(call.arguments)


def without_scale(arguments: dict[str, Any]) -> list[ControlNetInput]:
    return [replace(each, scale=0.0) for each in arguments.get("controlnet_inputs", ())]


@pytest.mark.parametrize("name", RUN)
def test_the_form_for_little_memory_of_a_row_gives_the_same_bits(name, harness, monkeypatch):
    """Its weights are stored in fp8, and those on the hub have values that fp8 has, too."""
    (plain,) = harness.run(script(ROWS[name], RUN[name]))
    let_blocks_travel(monkeypatch)
    (call,) = harness.run(script(ROWS[name], RUN[name], low_vram=True))
    check_low_vram(call, plain, stored=torch.float8_e4m3fn, on_disk=False)


@pytest.mark.parametrize("name", RUN)
def test_the_script_that_validates_a_lora_of_a_row_runs(name, harness, hub):
    """The file has the names of kohya, as `align_to_opensource_format` writes them."""
    file = dit_of(ROWS[name])
    before = read_weights(hub / file["model_id"], file["origin_file_pattern"])
    targets = ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear1"]
    path = harness.folder / trained_file(ROWS[name], "lora")
    write_lora(path, before, targets, lambda layer: f"lora_unet_{layer.replace('.', '_')}")
    harness.steps = 50
    (call,) = harness.run(script(ROWS[name], RUN[name], trained="lora"))
    assert isinstance(call.output, Image.Image)
    now = call.pipe.dit.state_dict()
    assert {f"{layer}.weight" for layer in targets} == {
        key for key in now if not torch.equal(now[key], before[key].float())
    }


TRAINED = {name: "controlnet[0]" for name in RUN if "Controlnet" in name} | {"flux/FLUX.1-dev-IP-Adapter": "ipadapter"}
"""Row -> the component that its script for full training trains, unless that is the transformer."""


@pytest.mark.parametrize("name", RUN)
def test_the_script_that_validates_all_weights_of_a_row_runs(name, harness):
    """Those of a transformer have the names of DiffSynth-Studio's own network."""
    harness.steps = 50
    role = TRAINED.get(name, "dit")
    (plain,) = harness.run(script(ROWS[name], RUN[name]))
    trained = {key: tensor / 2 for key, tensor in plain.pipe.parts[role].state_dict().items()}
    file = harness.folder / trained_file(ROWS[name], "full")
    write_full(file, trained, DIFFSYNTH_STUDIO if role == "dit" else ())
    (call,) = harness.run(script(ROWS[name], RUN[name], trained="full", role=role))
    assert isinstance(call.output, Image.Image)
    now = call.pipe.parts[role].state_dict()
    assert all(torch.equal(now[key], tensor) for key, tensor in trained.items())


def dit_of(row: dict[str, Any]) -> dict[str, str]:
    (file,) = [file for file in row["files"] if file["origin_file_pattern"].startswith("flux1-")]
    return file


@pytest.mark.parametrize("name", MISSING)
def test_a_row_whose_part_is_missing_says_so(name, harness):
    values = {**dict.fromkeys(ROWS[name]["call"], "None"), **COMMON, **_SIZE}
    with pytest.raises((NoFiles, ValueError, TypeError), match=MISSING[name]):
        harness.run(script(ROWS[name], values))
    assert harness.calls == []


def test_arguments_of_missing_parts_are_not_ignored(harness):
    row = {**ROWS["flux/FLUX.1-dev"], "call": ["prompt"]}
    (call,) = harness.run(script(row, COMMON))
    for argument in sorted(UNKNOWN):
        with pytest.raises(TypeError, match=argument):
            call.again(**{argument: None})
