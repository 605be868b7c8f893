"""Rows of DiffSynth-Studio's table of examples as scripts in the style of its documentation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS_FOLDER = Path(__file__).parents[1] / "data" / "rows"
DOORS = {
    "Flux2ImagePipeline": "diffsynth.pipelines.flux2_image",
    "FluxImagePipeline": "diffsynth.pipelines.flux_image",
    "QwenImagePipeline": "diffsynth.pipelines.qwen_image",
    "TemplatePipeline": "diffsynth.diffusion.template",
    "WanVideoPipeline": "diffsynth.pipelines.wan_video",
    "ZImagePipeline": "diffsynth.pipelines.z_image",
}

FLOAT8 = "float8_e4m3fn"
LOW_VRAM = {
    "flux": ((FLOAT8, "cpu"), (FLOAT8, "cpu"), (FLOAT8, "cuda"), ("bfloat16", "cuda")),
    "flux2": (("disk", "disk"), (FLOAT8, "cpu"), (FLOAT8, "cuda"), ("bfloat16", "cuda")),
    "qwen_image": (("disk", "disk"), (FLOAT8, "cpu"), (FLOAT8, "cuda"), ("bfloat16", "cuda")),
    "wanvideo": (("disk", "disk"), ("bfloat16", "cpu"), ("bfloat16", "cuda"), ("bfloat16", "cuda")),
    "z_image": (("bfloat16", "cpu"), ("bfloat16", "cpu"), ("bfloat16", "cuda"), ("bfloat16", "cuda")),
}
"""Folder of the examples -> dtype and device of weights in the four states, in its examples for little memory."""

LOW_VRAM_OF_ROWS = {
    "qwen_image/Qwen-Image-i2L": (("disk", "disk"), ("bfloat16", "cpu"), ("bfloat16", "cuda"), ("bfloat16", "cuda")),
}
"""Row -> the same, for those that differ from their folder."""

VRAM_LIMIT = '    vram_limit=torch.cuda.mem_get_info("cuda")[1] / (1024 ** 3) - 0.5,'
"""Line of an example for little memory: a limit of all device memory except 0.5 GiB."""


def read_rows(family: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a family by name."""
    rows = json.loads((ROWS_FOLDER / f"{family}.json").read_text(encoding="utf-8"))
    return {row["row"]: row for row in rows}


def script(
    row: Mapping[str, Any],
    values: Mapping[str, str],
    *,
    setup: Sequence[str] = (),
    low_vram: bool = False,
    trained: str = "",
    role: str = "dit",
) -> str:
    """Return the script of a row.

    Args:
        row: imports, files and arguments of the row.
        values: call argument -> its text in the script, for every argument of the row.
        setup: lines between the pipeline and its call.
        low_vram: whether as in the examples for little memory: `LOW_VRAM` for each file, and a limit of all device
            memory except 0.5 GiB.
        trained: "lora" or "full" as in the examples that validate training: the file `trained_file` is loaded.
        role: of the component that was trained, in Python.
    """
    (pipeline,) = [name for name in row["pipelines"] if name != "TemplatePipeline"]
    imports = [f"from {DOORS[pipeline]} import {pipeline}, ModelConfig"]
    imports += [f"from {DOORS[name]} import {name}" for name in row["pipelines"] if name != pipeline]
    if any(name.endswith("controlnet_inputs") for name in row["call"]):
        imports += [f"from {DOORS[pipeline]} import ControlNetInput"]
    if any("Image." in value for value in values.values()):
        imports += ["from PIL import Image"]
    file = trained_file(row, trained)
    loads = {
        "": [],
        "lora": [f'pipe.load_lora(pipe.{role}, "{file}", alpha=1)'],
        "full": [f'state_dict = load_state_dict("{file}")', f"pipe.{role}.load_state_dict(state_dict)"],
    }
    if trained == "full":
        imports += ["from diffsynth import load_state_dict"]
    tokenizers = [file for file in row["files"] if file.get("origin_file_pattern", "").endswith("tokenizer/")]
    processors = [file for file in row["files"] if file.get("origin_file_pattern", "").endswith("processor/")]
    models = [file for file in row["files"] if file not in (*tokenizers, *processors)]
    lines = [
        *imports,
        "import torch",
        "",
        *(_vram_config(row) if low_vram else []),
        f"pipe = {pipeline}.from_pretrained(",
        "    torch_dtype=torch.bfloat16,",
        '    device="cuda",',
        "    model_configs=[",
        *(f"        {_model_config(file, low_vram=low_vram)}," for file in models),
        "    ],",
        *(f"    tokenizer_config={_model_config(tokenizer)}," for tokenizer in tokenizers),
        *(f"    processor_config={_model_config(processor)}," for processor in processors),
        *([VRAM_LIMIT] if low_vram else []),
        ")",
        *(f"pipe.{name}(pipe.dit)" for name in row["methods"]),
        *loads[trained],
        *setup,
        f"image = pipe({', '.join(f'{name}={values[name]}' for name in row['call'])})",
        *_saves(row),
    ]
    return "\n".join(lines) + "\n"


def _saves(row: Mapping[str, Any]) -> list[str]:
    """Return the lines that save an image, or each of its layers."""
    if "layer_num" in row["call"]:
        return ["for index, layer in enumerate(image):", '    layer.save(f"image_{index}.png")']
    return [f'image.save("image_{row["row"].rpartition("/")[2]}.jpg")']


def trained_file(row: Mapping[str, Any], trained: str) -> str:
    """Return the path, below the working directory, of the weights that a training script of a row writes."""
    return f"models/train/{row['row'].rpartition('/')[2]}_{trained}/epoch-1.safetensors"


def video_script(
    row: Mapping[str, Any],
    calls: Sequence[Mapping[str, str]],
    *,
    media: Mapping[str, str] | None = None,
    fps: int = 15,
    vram_limit: bool = False,
    low_vram: bool = False,
    lora: Mapping[str, str] | None = None,
) -> str:
    """Return the script of a row of a video model, with one output file for each call.

    Args:
        row: imports, files and arguments of the row.
        calls: argument -> its text in the script, for each call; together, all arguments of the row.
        media: variable name -> file of the data set, an image or a video.
        fps: frames per second of the output files.
        vram_limit: whether to pass the limit of `low_vram` alone.
        low_vram: see `script`.
        lora: LoRA file that is loaded before the last call.
    """
    (pipeline,) = row["pipelines"]
    tokenizers = [file for file in row["files"] if file["origin_file_pattern"].endswith("umt5-xxl/")]
    lines = [
        "import torch",
        "from PIL import Image",
        "from diffsynth.utils.data import save_video, VideoData",
        f"from {DOORS[pipeline]} import {pipeline}, ModelConfig",
        "from modelscope import dataset_snapshot_download",
        "",
        *(_vram_config(row) if low_vram else []),
        f"pipe = {pipeline}.from_pretrained(",
        "    torch_dtype=torch.bfloat16,",
        '    device="cuda",',
        "    model_configs=[",
        *(f"        {_model_config(file, low_vram=low_vram)}," for file in row["files"] if file not in tokenizers),
        "    ],",
        *(f"    tokenizer_config={_model_config(file)}," for file in tokenizers),
        *([VRAM_LIMIT] if vram_limit or low_vram else []),
        ")",
    ]
    files = ", ".join(f'"{file}"' for file in (media or {}).values())
    if media:
        lines.append(
            f'dataset_snapshot_download("DiffSynth-Studio/examples", local_dir="./", allow_file_pattern=[{files}])'
        )
    for name, file in (media or {}).items():
        opened = f'VideoData("{file}", height=480, width=832)' if file.endswith(".mp4") else f'Image.open("{file}")'
        lines.append(f"{name} = {opened}")
    for number, values in enumerate(calls, start=1):
        if lora and number == len(calls):
            lines.append(f"pipe.load_lora(pipe.dit, {_model_config(lora)})")
        lines += [
            f"video = pipe({', '.join(f'{name}={value}' for name, value in values.items())})",
            f'save_video(video, "video_{number}_{row["row"].rpartition("/")[2]}.mp4", fps={fps}, quality=5)',
        ]
    return "\n".join(lines) + "\n"


def _vram_config(row: Mapping[str, Any]) -> list[str]:
    """Return the lines that set `vram_config`: the eight keys of the row's folder."""
    states = LOW_VRAM_OF_ROWS.get(row["row"]) or LOW_VRAM[row["row"].partition("/")[0]]
    lines = ["vram_config = {"]
    for state, (dtype, device) in zip(("offload", "onload", "preparing", "computation"), states, strict=True):
        lines.append(f'    "{state}_dtype": ' + ('"disk",' if dtype == "disk" else f"torch.{dtype},"))
        lines.append(f'    "{state}_device": "{device}",')
    return [*lines, "}"]


def _model_config(file: Mapping[str, str], *, low_vram: bool = False) -> str:
    arguments = [f'{name}="{value}"' for name, value in file.items()] + ["**vram_config"] * low_vram
    return f"ModelConfig({', '.join(arguments)})"
