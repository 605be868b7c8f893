"""Qwen-Image examples of DiffSynth-Studio run on the tiny hub."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffsynth.testing import tiny_hub
from diffsynth_qwen_image.features import edit
from limited import let_blocks_travel
from qwen_image_files import write_controlnets, write_image_to_lora, write_lora
from row_harness import Harness, check_arguments, check_low_vram, differs, round_weights
from row_scripts import read_rows, script, trained_file
from trained_weights import read_weights, write_full
from trained_weights import write_lora as write_trained_lora

ROWS = {name.removeprefix("qwen_image/"): row for name, row in read_rows("qwen_image").items()}
STEPS = 15
"""Divisor of the number of steps: 40 become 3, 4 become 1."""

COMMON = {"prompt": '"a girl in a red coat"', "seed": "1", "num_inference_steps": "40"}
IMAGE = 'Image.linear_gradient("L").resize((80, 64)).convert("RGB")'
LIST = f'[{IMAGE}, Image.radial_gradient("L").convert("RGB")]'
MASK = 'Image.linear_gradient("L")'
CONTROLLED = {"prompt": COMMON["prompt"], "seed": "1"}
CANNY = f"ControlNetInput(image={IMAGE})"
CHANGED = f"{MASK}.resize((80, 64))"
INPAINT = COMMON | {"input_image": IMAGE, "inpaint_mask": CHANGED}
ENTITIES = COMMON | {
    "eligen_entity_prompts": '["a red coat", "snow"]',
    "eligen_entity_masks": f"[{MASK}.rotate(90), {MASK}]",
    "negative_prompt": '"blurry"',
    "cfg_scale": "4.0",
    "height": "1024",
    "width": "1024",
}
EDIT = COMMON | {"edit_image": IMAGE, "edit_image_auto_resize": "False", "height": "1328", "width": "1024"}
EDIT_2511 = EDIT | {"edit_image": LIST, "height": "1152", "width": "896", "zero_cond_t": "True"}
LAYER_IMAGE = 'Image.linear_gradient("L").resize((54, 30)).convert("RGBA")'
LAYER_MASK = 'Image.merge("LA", (Image.new("L", (64, 64)), Image.linear_gradient("L").resize((64, 64))))'
LAYERED = COMMON | {"layer_input_image": LAYER_IMAGE, "layer_num": "3"}
LAYERED_CONTROL = LAYERED | {"layer_num": "0", "num_inference_steps": "30", "height": "1024", "width": "1024"}

RUN = {
    "Qwen-Image": COMMON,
    "Qwen-Image-2512": COMMON,
    "Qwen-Image-Distill-Full": COMMON | {"num_inference_steps": "15", "cfg_scale": "1"},
    "Qwen-Image-Distill-LoRA": COMMON | {"num_inference_steps": "15", "cfg_scale": "1"},
    "Qwen-Image-Distill-DMD2": COMMON
    | {"num_inference_steps": "30", "cfg_scale": "1", "exponential_shift_mu": str(math.log(2.5))},
    "Qwen-Image-Edit": EDIT,
    "Qwen-Image-Edit-2509": EDIT | {"edit_image": LIST},
    "Qwen-Image-Edit-2511": EDIT_2511,
    "Qwen-Image-Edit-2511-ICEdit": EDIT_2511 | {"negative_prompt": '"blurry"'},
    "Qwen-Image-Edit-2511-Lightning": EDIT_2511 | {"num_inference_steps": "4", "cfg_scale": "1.0"},
    "Qwen-Image-Edit-Lowres-Fix": EDIT | {"height": "1024", "width": "768", "edit_rope_interpolation": "True"},
    "Qwen-Image-Blockwise-ControlNet-Canny": CONTROLLED | {"blockwise_controlnet_inputs": f"[{CANNY}]"},
    "Qwen-Image-Blockwise-ControlNet-Depth": CONTROLLED | {"blockwise_controlnet_inputs": f"[{CANNY}]"},
    "Qwen-Image-Blockwise-ControlNet-Inpaint": INPAINT
    | {"blockwise_controlnet_inputs": f"[ControlNetInput(image={IMAGE}, inpaint_mask={CHANGED})]"},
    "Qwen-Image-Blockwise-ControlNet-InpaintCanny": INPAINT
    | {
        "blockwise_controlnet_inputs": f"[ControlNetInput(image={IMAGE}, inpaint_mask={CHANGED}, controlnet_id=0), "
        f"ControlNetInput(image={IMAGE}, controlnet_id=1)]"
    },
    "Qwen-Image-Layered": LAYERED | {"num_inference_steps": "50", "height": "480", "width": "864"},
    "Qwen-Image-Layered-Control": LAYERED_CONTROL | {"num_inference_steps": "30", "cfg_scale": "4"},
    "Qwen-Image-Layered-Control-V2": LAYERED_CONTROL | {"cfg_scale": "1.0", "context_image": LAYER_MASK},
    "Qwen-Image-In-Context-Control-Union": COMMON
    | {"context_image": IMAGE, "negative_prompt": '"blurry"', "height": "1024", "width": "1024"},
    "Qwen-Image-EliGen": ENTITIES | {"num_inference_steps": "30"},
    "Qwen-Image-EliGen-V2": ENTITIES,
    "Qwen-Image-EliGen-Poster": ENTITIES | {"height": "1280", "width": "768"},
    "FireRed-Image-Edit-1.0": EDIT | {"height": "1152", "width": "896"},
    "FireRed-Image-Edit-1.1": EDIT | {"height": "1152", "width": "896"},
}
"""Row -> arguments of its call, with the values of DiffSynth-Studio's table, except that images are not enlarged."""

CONTROLS = "Qwen-Image-Blockwise-ControlNet-InpaintCanny"

LORAS = {
    "Qwen-Image-Distill-LoRA": "DiffSynth-Studio/Qwen-Image-Distill-LoRA:model.safetensors",
    "Qwen-Image-Distill-DMD2": "MusePublic/Qwen-Image-Distill:dmd2.safetensors",
    "Qwen-Image-Edit-2511-ICEdit": "DiffSynth-Studio/Qwen-Image-Edit-2511-ICEdit-LoRA:model.safetensors",
    "Qwen-Image-Edit-2511-Lightning": (
        "lightx2v/Qwen-Image-Edit-2511-Lightning:Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors"
    ),
    "Qwen-Image-Layered-Control-V2": "DiffSynth-Studio/Qwen-Image-Layered-Control-V2:model.safetensors",
    "Qwen-Image-In-Context-Control-Union": "DiffSynth-Studio/Qwen-Image-In-Context-Control-Union:model.safetensors",
    "Qwen-Image-EliGen": "DiffSynth-Studio/Qwen-Image-EliGen:model.safetensors",
    "Qwen-Image-EliGen-V2": "DiffSynth-Studio/Qwen-Image-EliGen-V2:model.safetensors",
    "Qwen-Image-EliGen-Poster": "DiffSynth-Studio/Qwen-Image-EliGen-Poster:model.safetensors",
    "Qwen-Image-Edit-Lowres-Fix": "DiffSynth-Studio/Qwen-Image-Edit-Lowres-Fix:model.safetensors",
}
"""Row -> its LoRA."""

UNTRAINED = {
    *("Qwen-Image-Distill-DMD2", "Qwen-Image-Edit-2511-ICEdit", "Qwen-Image-Edit-2511-Lightning"),
    *("Qwen-Image-Edit-Lowres-Fix", CONTROLS),
}
"""Rows that DiffSynth-Studio has no training script of."""

IMAGE_TO_LORA = COMMON | {"height": "1024", "width": "1024", "num_inference_steps": "50"}
IMAGE_LORAS = {
    "style": ("SigLIP2-G384/model", "DINOv3-7B/model", "Qwen-Image-i2L-Style"),
    "content": ("SigLIP2-G384/model", "DINOv3-7B/model", "Qwen-Image-i2L-Coarse", "Qwen-Image-i2L-Fine", "model*"),
}
"""Script of the row Qwen-Image-i2L -> the files of the networks that make its LoRA, without their suffix."""

MODELS = ["qwen-image", "qwen-image-2512", "qwen-image-distill-full", "qwen-image-edit", "qwen-image-edit-2509"]
MODELS += ["qwen-image-edit-2511", "firered-image-edit-1.0", "firered-image-edit-1.1"]
MODELS += ["qwen-image-layered", "qwen-image-layered-control"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, MODELS)
    write_controlnets(root)
    round_weights(root, torch.float8_e4m3fn)
    for seed, source in enumerate(LORAS.values()):
        write_lora(root, source, seed)
    write_image_to_lora(root)
    write_lora(root, "DiffSynth-Studio/Qwen-Image-i2L:Qwen-Image-i2L-Bias.safetensors", seed=9)
    return root


@pytest.fixture
def harness(hub, monkeypatch, tmp_path) -> Harness:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setattr(edit, "AREA", 64 * 64)
    monkeypatch.setattr(edit, "LISTED_AREA", 64 * 64)
    return Harness(monkeypatch, tmp_path, steps=STEPS, precise=True)


def example(name: str, *, hotload: bool = False, **options: Any) -> str:
    """Return the script of a row; its prompt is passed by name, and its LoRA is fused unless `hotload` is True. Scripts
    that validate training do not load it.
    """
    row = ROWS[name]
    call = ["prompt", *(argument for argument in row["call"] if argument != "prompt")]
    files, setup = row["files"], []
    if name in LORAS:
        model, _, file = LORAS[name].partition(":")
        files = [each for each in files if each.get("origin_file_pattern") != file]
        config = f'ModelConfig(model_id="{model}", origin_file_pattern="{file}")'
        if "trained" not in options:
            setup = [f"pipe.load_lora(pipe.dit, {config}{', hotload=True' if hotload else ''})"]
    return script({**row, "call": call, "files": files, "methods": []}, RUN[name], setup=setup, **options)


def config_text(file: dict[str, str], more: str = "") -> str:
    return f'ModelConfig(model_id="{file["model_id"]}", origin_file_pattern="{file["origin_file_pattern"]}"{more})'


def image_lora_example(kind: str, *, low_vram: bool = False) -> str:
    """Return the script of the row Qwen-Image-i2L for the style or for the content, which takes the bias LoRA, too."""
    row, files = ROWS["Qwen-Image-i2L"], []
    for file in row["files"]:
        name = file["origin_file_pattern"].removesuffix(".safetensors").rpartition("text_encoder/")[2]
        if name in IMAGE_LORAS[kind] and file not in files:
            files.append(file)
    placed = ", **vram_config" if low_vram else ""
    configs = [config_text(file, placed) for file in files]
    setup = f"""
from diffsynth.pipelines.qwen_image import QwenImageUnit_Image2LoRADecode, QwenImageUnit_Image2LoRAEncode
from PIL import Image
from safetensors.torch import save_file
maker = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[{", ".join(configs)}],
    processor_config=ModelConfig(model_id="Qwen/Qwen-Image-Edit", origin_file_pattern="processor/"),
)
images = {IMAGE if kind == "content" else LIST}
with torch.no_grad():
    embs = QwenImageUnit_Image2LoRAEncode().process(maker, image2lora_images=images)
    lora = QwenImageUnit_Image2LoRADecode().process(maker, **embs)["lora"]
save_file(lora, "lora.safetensors")
pipe.load_lora(pipe.dit, state_dict=lora)
""".splitlines()
    if kind == "content":
        setup.append(f"pipe.load_lora(pipe.dit, {config_text(row['files'][0])})")
    own = [file for file in row["files"] if file["model_id"] == "Qwen/Qwen-Image"]
    files = [file for number, file in enumerate(own) if file not in own[:number]]
    row = {**row, "call": ["prompt", *row["call"]], "files": files, "methods": []}
    return script(row, IMAGE_TO_LORA, setup=setup, low_vram=low_vram)


def test_every_row_is_here() -> None:
    assert len(ROWS) == 25
    assert set(ROWS) == {*RUN, "Qwen-Image-i2L"}
    assert {name for name in RUN if ROWS[name]["methods"]} == set(LORAS)


@pytest.mark.parametrize("name", RUN)
def test_a_row_runs_and_every_argument_of_it_counts(name, harness) -> None:
    (call,) = harness.run(example(name))
    sides = tuple(-(-int(RUN[name].get(side, 1328)) // 16 // 16) * 16 for side in ("width", "height"))
    layers = int(RUN[name].get("layer_num", -1)) + 1
    images = call.output if layers else [call.output]
    assert [(image.mode, image.size) for image in images] == [("RGBA" if layers else "RGB", sides)] * (layers or 1)
    assert set(call.arguments) == {"prompt", *ROWS[name]["call"]}
    inputs = [replace(each, scale=0.0) for each in call.arguments.get("blockwise_controlnet_inputs", ())]
    refused = check_arguments(call, neutral={"blockwise_controlnet_inputs": [inputs]})
    pair = {argument for argument in call.arguments if argument.startswith("eligen_entity")}
    of_layers = {"layer_input_image", "layer_num"} if layers else set()
    others = {"input_image"} if "inpaint_mask" in call.arguments else of_layers
    assert refused == (pair or others), "each is refused without the other"
    assert not pair or differs(call.again(**dict.fromkeys(pair, ...)), call.output)


@pytest.mark.parametrize("name", RUN)
def test_the_form_for_little_memory_of_a_row_gives_the_same_bits(name, harness, monkeypatch) -> None:
    """Its weights are stored in fp8, and those on the hub have values that fp8 has, too; LoRAs are beside them."""
    harness.steps = 50
    (plain,) = harness.run(example(name, hotload=True))
    let_blocks_travel(monkeypatch)
    (call,) = harness.run(example(name, low_vram=True))
    check_low_vram(call, plain, stored=torch.float8_e4m3fn, on_disk=True)
    if name in LORAS:
        call.pipe.clear_lora()
        assert differs(call.again(), call.output)


def weights_of(name: str, role: str, hub: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a row's transformer, or of its first block-wise ControlNet."""
    pattern = "*diffusion_pytorch_model[*].safetensors" if role == "dit" else "model.safetensors"
    (file,) = [each for each in ROWS[name]["files"] if fnmatch(each.get("origin_file_pattern", ""), pattern)]
    return read_weights(hub / file["model_id"], file["origin_file_pattern"])


@pytest.mark.parametrize("name", [name for name in RUN if name not in UNTRAINED])
def test_the_script_that_validates_a_lora_of_a_row_runs(name, harness, hub) -> None:
    before = weights_of(name, "dit", hub)
    targets = {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"}
    write_trained_lora(harness.folder / trained_file(ROWS[name], "lora"), before, targets, str)
    harness.steps = 50
    (call,) = harness.run(example(name, trained="lora"))
    now = call.pipe.dit.state_dict()
    assert {f"{layer}.weight" for layer in targets} == {
        key for key in now if not torch.equal(now[key], before[key].float())
    }


@pytest.mark.parametrize("name", [name for name in RUN if name not in {*UNTRAINED, *LORAS}])
def test_the_script_that_validates_all_weights_of_a_row_runs(name, harness, hub) -> None:
    role = "blockwise_controlnet[0]" if "Blockwise" in name else "dit"
    trained = {key: tensor / 2 for key, tensor in weights_of(name, role, hub).items()}
    write_full(harness.folder / trained_file(ROWS[name], "full"), trained)
    harness.steps = 50
    (call,) = harness.run(example(name, trained="full", role=role))
    now = call.pipe.parts[role].state_dict()
    assert now.keys() == trained.keys()
    assert all(torch.equal(now[key], tensor.float()) for key, tensor in trained.items())


@pytest.mark.parametrize("kind", IMAGE_LORAS)
def test_the_row_with_a_lora_of_images(kind, harness, monkeypatch) -> None:
    """Every argument counts, and the form for little memory, without fp8, makes the same LoRA to the bit."""
    (call,) = harness.run(image_lora_example(kind))
    assert call.output.size == (64, 64)
    assert set(call.arguments) == {"prompt", *ROWS["Qwen-Image-i2L"]["call"]}
    if kind == "style":
        assert not check_arguments(call)
    lora = load_file(harness.folder / "lora.safetensors")
    assert len(lora) == 2 * 12 * call.pipe.dit.config.n_layers
    let_blocks_travel(monkeypatch)
    (small,) = harness.run(image_lora_example(kind, low_vram=True))
    assert small.output.size == (64, 64)
    again = load_file(harness.folder / "lora.safetensors")
    assert all(torch.equal(again[key], lora[key]) for key in lora)
