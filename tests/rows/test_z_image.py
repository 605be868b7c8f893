"""Z-Image examples of DiffSynth-Studio run on the tiny hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth.core.loader.save import save_checkpoint
from diffsynth.errors import NoFiles
from diffsynth.models.dinov3 import Dinov3ImageEncoder
from diffsynth.models.image_config import TINY_DINOV3, TINY_SIGLIP
from diffsynth.models.image_to_lora import ImageToLoRA
from diffsynth.models.siglip import SiglipImageEncoder
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.testing import tiny_hub
from diffsynth_zimage.config import TINY_CONTROLNET, TINY_DIT
from diffsynth_zimage.controlnet import ZImageControlNet
from diffsynth_zimage.image_to_lora_config import GROUPS, TINY_STYLE
from diffsynth_zimage.plugin import TINY
from limited import let_blocks_travel
from parity import draw_weights, shapes_of
from row_harness import Harness, check_arguments, check_low_vram, differs, write_data_set
from row_scripts import read_rows, script, trained_file
from trained_weights import read_weights, write_full, write_lora

ROWS = read_rows("z_image")
STEPS = 16
PROMPT = '"Young Chinese woman in red Hanfu, intricate embroidery. Impeccable makeup, red floral forehead pattern."'
COMMON = {"prompt": PROMPT, "seed": "42", "rand_device": '"cuda"'}
GUIDED = {"cfg_scale": "4", "num_inference_steps": "50"}

_IMAGE = 'Image.linear_gradient("L").resize((80, 64)).convert("RGB")'
_CONTROL = COMMON | {
    "controlnet_inputs": f"[ControlNetInput(image={_IMAGE}, scale=0.7)]",
    "height": "1024",
    "width": "1024",
}
_CONTROLNET = "PAI/Z-Image-Turbo-Fun-Controlnet-Union-2.1"
RUN = {
    "z_image/Z-Image-Turbo": COMMON,
    "z_image/Z-Image": COMMON | GUIDED,
    "z_image/Z-Image-Omni-Base": COMMON | GUIDED | {"edit_image": _IMAGE},
    "z_image/Z-Image-Turbo-Fun-Controlnet-Union-2.1": _CONTROL | {"num_inference_steps": "30"},
    "z_image/Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps": _CONTROL,
    "z_image/Z-Image-Turbo-Fun-Controlnet-Tile-2.1-8steps": _CONTROL,
}
"""Row -> arguments of its call, with the values of DiffSynth-Studio's table."""

DEFAULTS = {"rand_device", "height", "width"}
"""Arguments whose values in the table are our defaults."""

_STYLE = COMMON | GUIDED | {"negative_prompt": '"blurred"', "positive_only_lora": "lora", "sigma_shift": "8"}
STYLE = {"z_image/Z-Image-Omni-Base-i2L": _STYLE, "z_image/Z-Image-i2L": _STYLE}
"""Row with a LoRA of images -> arguments of its call."""

MAKE_LORA = f"""
from diffsynth.pipelines.z_image import ZImageUnit_Image2LoRADecode, ZImageUnit_Image2LoRAEncode
from PIL import Image
from safetensors.torch import save_file
images = [{_IMAGE}.rotate(90 * turn) for turn in range(3)]
with torch.no_grad():
    embs = ZImageUnit_Image2LoRAEncode().process(pipe, image2lora_images=images)
    lora = ZImageUnit_Image2LoRADecode().process(pipe, **embs)["lora"]
save_file(lora, "lora.safetensors")
""".splitlines()

MISSING = {
    "z_image/ZImage-i2L-v2": ("diffusion templates", {}, "diffsynth.diffusion"),
}
"""Row -> the unsupported component, arguments of its call, and the name that the error must contain."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, ["z-image", "z-image-turbo", "z-image-omni-base"])
    write_style_networks(root)
    config = replace(TINY_CONTROLNET, dim=256, n_heads=2, n_kv_heads=2)
    saved = {"architecture": "z_image_controlnet", "config": config, "layout": "z_image_controlnet"}
    for row in ROWS.values():
        for file in row["files"]:
            if file["model_id"] == _CONTROLNET:
                path = root / _CONTROLNET / file["origin_file_pattern"]
                path.parent.mkdir(parents=True, exist_ok=True)
                save_checkpoint(ZImageControlNet(config), path, **saved)
    return root


def write_style_networks(root: Path) -> None:
    """Write the image encoders and image-to-LoRA networks under the names of the hub."""
    dit = replace(TINY_DIT, **TINY["dit"])
    counts = (dit.n_layers, dit.n_refiner_layers, dit.n_refiner_layers)
    sizes = {"w1": (dit.dim, dit.ffn_dim), "w2": (dit.ffn_dim, dit.dim), "w3": (dit.dim, dit.ffn_dim)}
    config = replace(
        TINY_STYLE,
        stacks=tuple((*stack[:2], count) for stack, count in zip(TINY_STYLE.stacks, counts, strict=True)),
        groups=(
            tuple((name, dit.dim, dit.dim) for name in GROUPS[0]),
            tuple((name, *sizes[name.rpartition(".")[2]]) for name in GROUPS[1]),
        ),
    )
    siglip = draw_weights(shapes_of(SiglipImageEncoder(TINY_SIGLIP)), seed=1)
    dinov3 = draw_weights(shapes_of(Dinov3ImageEncoder(TINY_DINOV3)), seed=2)
    style = draw_weights(shapes_of(ImageToLoRA(config)), seed=3)
    files = {
        "General-Image-Encoders/SigLIP2-G384": {key.removeprefix("vision_model."): siglip[key] for key in siglip},
        "General-Image-Encoders/DINOv3-7B": dinov3 | {"embeddings.mask_token": torch.zeros(1, 1, 256)},
        # The LoRA is weaker, so that results are not all black or white.
        "Z-Image-i2L": {key: 0.3 * tensor for key, tensor in style.items()},
        "Z-Image-Omni-Base-i2L": {key: 0.2 * tensor for key, tensor in style.items()},
    }
    for name, tensors in files.items():
        path = root / "DiffSynth-Studio" / name / "model.safetensors"
        path.parent.mkdir(parents=True)
        save_file(tensors, path)


@pytest.fixture
def harness(hub, monkeypatch, tmp_path) -> Harness:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return Harness(monkeypatch, tmp_path, steps=STEPS, precise=True)


def test_every_row_is_here():
    assert len(ROWS) == 9
    assert set(ROWS) == {*RUN, *STYLE, *MISSING}


@pytest.mark.parametrize("name", RUN)
def test_a_row_runs_and_every_argument_of_it_counts(name, harness):
    (call,) = harness.run(script(ROWS[name], RUN[name]))
    assert isinstance(call.output, Image.Image)
    assert call.output.size == (64, 64)
    assert (harness.folder / f"image_{name.rpartition('/')[2]}.jpg").is_file()
    assert set(call.arguments) == set(ROWS[name]["call"])
    changed = [argument for argument in call.arguments if not call.is_default(argument)]
    assert {"prompt", "seed"} <= set(changed) == set(ROWS[name]["call"]) - DEFAULTS
    assert not check_arguments(call, neutral={"controlnet_inputs": [without_scale(call.arguments)]})


def without_scale(arguments: dict[str, Any]) -> list[ControlNetInput]:
    return [replace(each, scale=0.0) for each in arguments.get("controlnet_inputs", ())]


@pytest.mark.parametrize("name", RUN)
def test_the_form_for_little_memory_of_a_row_gives_the_same_bits(name, harness, monkeypatch):
    harness.steps = 50
    (plain,) = harness.run(script(ROWS[name], RUN[name]))
    let_blocks_travel(monkeypatch)
    (call,) = harness.run(script(ROWS[name], RUN[name], low_vram=True))
    check_low_vram(call, plain, stored=torch.float32, on_disk=False)


def weights_of(name: str, role: str, hub: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a row's transformer, or of its ControlNet."""
    files = [file for file in ROWS[name]["files"] if file["model_id"] == _CONTROLNET]
    if role == "dit":
        files = [file for file in ROWS[name]["files"] if file["origin_file_pattern"] == "transformer/*.safetensors"]
    return read_weights(hub / files[0]["model_id"], files[0]["origin_file_pattern"])


@pytest.mark.parametrize("name", RUN)
def test_the_script_that_validates_a_lora_of_a_row_runs(name, harness, hub):
    before = weights_of(name, "dit", hub)
    targets = {"layers.0.attention.to_q", "layers.1.feed_forward.w2"}
    write_lora(harness.folder / trained_file(ROWS[name], "lora"), before, targets, str)
    harness.steps = 50
    (call,) = harness.run(script(ROWS[name], RUN[name], trained="lora"))
    now = call.pipe.dit.state_dict()
    assert {f"{layer}.weight" for layer in targets} == {
        key for key in now if not torch.equal(now[key], before[key].float())
    }


@pytest.mark.parametrize("name", RUN)
def test_the_script_that_validates_all_weights_of_a_row_runs(name, harness, hub):
    role = "controlnet[0]" if "Controlnet" in name else "dit"
    trained = {key: tensor / 2 for key, tensor in weights_of(name, role, hub).items()}
    write_full(harness.folder / trained_file(ROWS[name], "full"), trained)
    harness.steps = 50
    (call,) = harness.run(script(ROWS[name], RUN[name], trained="full", role=role))
    now = call.pipe.parts[role].state_dict()
    assert now.keys() == trained.keys()
    assert all(torch.equal(now[key], tensor.float()) for key, tensor in trained.items())


@pytest.mark.parametrize("name", MISSING)
def test_a_row_whose_part_is_missing_says_so(name, harness):
    _, values, named = MISSING[name]
    with pytest.raises((NoFiles, ImportError), match=named):
        harness.run(script(ROWS[name], values))
    assert harness.calls == []


@pytest.mark.parametrize("name", STYLE)
def test_a_row_with_a_lora_of_images(name, harness, monkeypatch):
    """Every argument counts, a LoRA of zeros is neutral, and the form for little memory gives the same bits."""
    (call,) = harness.run(script(ROWS[name], STYLE[name], setup=MAKE_LORA))
    assert set(call.arguments) == set(ROWS[name]["call"])
    lora = call.arguments["positive_only_lora"]
    assert set(load_file(harness.folder / "lora.safetensors")) == set(lora)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in lora.items()}
    assert not check_arguments(call, neutral={"positive_only_lora": [zeros]})
    let_blocks_travel(monkeypatch)
    (small,) = harness.run(script(ROWS[name], STYLE[name], setup=MAKE_LORA, low_vram=True))
    check_low_vram(small, call, stored=torch.float32, on_disk=False)


@pytest.mark.parametrize("value", [True, False])
def test_the_switch_for_npus_changes_nothing_elsewhere(value, harness):
    name = "z_image/Z-Image-Turbo"
    plain = script(ROWS[name], RUN[name])
    (call,) = harness.run(plain.replace("device=", f"enable_npu_patch={value}, device=", 1))
    (reference,) = harness.run(plain)
    assert not differs(call.output, reference.output)


def test_the_switch_for_npus_is_a_bool(harness):
    plain = script(ROWS["z_image/Z-Image-Turbo"], COMMON)
    with pytest.raises(TypeError, match="enable_npu_patch='yes': expected True or False"):
        harness.run(plain.replace("device=", 'enable_npu_patch="yes", device=', 1))


def test_the_harness_keeps_everything_but_size_steps_and_device(harness):
    calls = harness.run(
        "from modelscope import dataset_snapshot_download\n"
        "import torch\n"
        "from PIL import Image\n"
        "class pipe:\n"
        "    pass\n"
        'dataset_snapshot_download(dataset_id="a/b", local_dir="data", allow_file_pattern=["x.jpg", "y/z.png"])\n'
        'assert torch.cuda.mem_get_info("cuda")[1] / 1024**3 == 80\n'
        'assert Image.open("data/y/z.png").size == (64, 64)\n'
    )
    assert calls == []
    assert write_data_set("a/b", str(harness.folder / "more"), "one.png").endswith("more")
    assert (harness.folder / "more" / "one.png").is_file()
