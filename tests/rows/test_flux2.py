"""FLUX.2 examples of DiffSynth-Studio run on the tiny hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffsynth.testing import tiny_hub
from diffsynth_flux.flux2.features import edit
from limited import let_blocks_travel
from row_harness import Harness, check_arguments, check_low_vram, differs, round_weights
from row_scripts import read_rows, script, trained_file
from trained_weights import read_weights, write_full, write_lora

ROWS = read_rows("flux2")
COMMON = {"prompt": '"Masterpiece, best quality. A girl in a red coat"', "seed": "1", "rand_device": '"cuda"'}
GUIDED = {"cfg_scale": "4", "num_inference_steps": "50"}
EDITED = {"edit_image": 'Image.linear_gradient("L").resize((80, 64)).convert("RGB")'}
STEPS = 15
"""Divisor of the number of steps: 50 become 4, 30 become 2."""

RUN = {
    "flux2/FLUX.2-dev": COMMON | {"num_inference_steps": "50", "embedded_guidance": "2.5"},
    "flux2/FLUX.2-klein-4B": COMMON | {"num_inference_steps": "4"},
    "flux2/FLUX.2-klein-9B": COMMON | {"num_inference_steps": "4"},
    "flux2/FLUX.2-klein-base-4B": COMMON | GUIDED,
    "flux2/FLUX.2-klein-base-9B": COMMON | GUIDED,
}
"""Row -> arguments of its call without a reference image, with the values of DiffSynth-Studio's table."""

MISSING = sorted(set(ROWS) - set(RUN))
"""Rows of diffusion templates, which are not supported."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, [name.removeprefix("flux2/").lower() for name in RUN])
    round_weights(root, torch.float8_e4m3fn)
    return root


@pytest.fixture
def harness(hub, monkeypatch, tmp_path) -> Harness:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setattr(edit, "AREA", 64 * 64)
    return Harness(monkeypatch, tmp_path, steps=STEPS, precise=True)


def example(name: str, *, edited: bool = True, **options: Any) -> str:
    """Return the script of a row, with or without its reference image; its prompt is passed by name."""
    values = RUN[name] | (EDITED if edited else {})
    row = ROWS[name]
    call = ["prompt", *(argument for argument in row["call"] if argument in values)]
    return script({**row, "call": call}, values, **options)


def test_every_row_is_here() -> None:
    assert len(ROWS) == 18
    assert set(RUN) < set(ROWS)
    assert all("TemplatePipeline" in ROWS[name]["pipelines"] for name in MISSING)


@pytest.mark.parametrize("name", RUN)
def test_a_row_runs_and_every_argument_of_it_counts(name, harness) -> None:
    (call,) = harness.run(example(name))
    assert isinstance(call.output, Image.Image)
    assert call.output.size == (64, 64)
    assert (harness.folder / f"image_{name.rpartition('/')[2]}.jpg").is_file()
    assert set(call.arguments) == {"prompt", *ROWS[name]["call"]}
    changed = [argument for argument in call.arguments if not call.is_default(argument)]
    assert set(changed) == {"prompt", *ROWS[name]["call"]} - {"rand_device"}
    assert not check_arguments(call)


def test_a_row_without_a_reference_image_runs(harness) -> None:
    (call,) = harness.run(example("flux2/FLUX.2-dev", edited=False))
    assert call.output.size == (64, 64)
    assert not differs(call.again(edit_image=None), call.output)


@pytest.mark.parametrize("name", RUN)
def test_the_form_for_little_memory_of_a_row_gives_the_same_bits(name, harness, monkeypatch) -> None:
    """Its weights are stored in fp8, and those on the hub have values that fp8 has, too."""
    (plain,) = harness.run(example(name))
    let_blocks_travel(monkeypatch)
    (call,) = harness.run(example(name, low_vram=True))
    check_low_vram(call, plain, stored=torch.float8_e4m3fn, on_disk=True)


@pytest.mark.parametrize("name", RUN)
def test_the_script_that_validates_a_lora_of_a_row_runs(name, harness, hub) -> None:
    before = read_weights(hub / "black-forest-labs" / name.removeprefix("flux2/"), "transformer/*.safetensors")
    targets = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_qkv_mlp_proj"]
    write_lora(harness.folder / trained_file(ROWS[name], "lora"), before, targets, str)
    harness.steps = 50
    (call,) = harness.run(example(name, edited=False, trained="lora"))
    assert call.output.size == (64, 64)
    now = call.pipe.dit.state_dict()
    assert {f"{layer}.weight" for layer in targets} == {
        key for key in now if not torch.equal(now[key], before[key].float())
    }


@pytest.mark.parametrize("name", sorted(set(RUN) - {"flux2/FLUX.2-dev"}))
def test_the_script_that_validates_all_weights_of_a_row_runs(name, harness, hub) -> None:
    """There is none for FLUX.2-dev."""
    before = read_weights(hub / "black-forest-labs" / name.removeprefix("flux2/"), "transformer/*.safetensors")
    trained = {key: tensor / 2 for key, tensor in before.items()}
    write_full(harness.folder / trained_file(ROWS[name], "full"), trained)
    harness.steps = 50
    (call,) = harness.run(example(name, edited=False, trained="full"))
    assert call.output.size == (64, 64)
    now = call.pipe.dit.state_dict()
    assert all(torch.equal(now[key], tensor.float()) for key, tensor in trained.items())


@pytest.mark.parametrize("name", MISSING)
def test_a_row_whose_part_is_missing_says_so(name, harness) -> None:
    with pytest.raises(ImportError, match=r"diffsynth\.diffusion"):
        harness.run(script(ROWS[name], {}))
    assert harness.calls == []


def test_an_argument_of_a_missing_part_is_not_ignored(harness) -> None:
    name = "flux2/FLUX.2-klein-base-4B"
    row = {**ROWS[name], "call": ["prompt", "seed", "template_inputs"]}
    with pytest.raises(TypeError, match="template_inputs"):
        harness.run(script(row, COMMON | {"template_inputs": "[]"}))
