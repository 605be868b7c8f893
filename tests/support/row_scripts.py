"""Rows of the reference's examples as the scripts that its users have, word for word in their style."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS_FOLDER = Path(__file__).parents[1] / "data" / "rows"
DOORS = {
    "TemplatePipeline": "diffsynth.diffusion.template",
    "WanVideoPipeline": "diffsynth.pipelines.wan_video",
    "ZImagePipeline": "diffsynth.pipelines.z_image",
}


def read_rows(family: str) -> dict[str, dict[str, Any]]:
    """Rows of a family by name."""
    rows = json.loads((ROWS_FOLDER / f"{family}.json").read_text(encoding="utf-8"))
    return {row["row"]: row for row in rows}


def script(row: Mapping[str, Any], values: Mapping[str, str], *, vram_limit: bool = False) -> str:
    """A row's example.

    Args:
        row: what it imports, loads and gives.
        values: call argument -> its text in the script, for every argument of the row.
        vram_limit: as in the examples for little memory, all that the device has but half a GiB.
    """
    (pipeline,) = [name for name in row["pipelines"] if name != "TemplatePipeline"]
    imports = [f"from {DOORS[pipeline]} import {pipeline}, ModelConfig"]
    imports += [f"from {DOORS[name]} import {name}" for name in row["pipelines"] if name != pipeline]
    tokenizer, *models = row["files"]
    lines = [
        *imports,
        "import torch",
        "",
        f"pipe = {pipeline}.from_pretrained(",
        "    torch_dtype=torch.bfloat16,",
        '    device="cuda",',
        "    model_configs=[",
        *(f"        {_model_config(file)}," for file in models),
        "    ],",
        f"    tokenizer_config={_model_config(tokenizer)},",
        *(['    vram_limit=torch.cuda.mem_get_info("cuda")[1] / (1024 ** 3) - 0.5,'] if vram_limit else []),
        ")",
        *(f"pipe.{name}(pipe.dit)" for name in row["methods"]),
        f"image = pipe({', '.join(f'{name}={values[name]}' for name in row['call'])})",
        f'image.save("image_{row["row"].rpartition("/")[2]}.jpg")',
    ]
    return "\n".join(lines) + "\n"


def video_script(
    row: Mapping[str, Any],
    calls: Sequence[Mapping[str, str]],
    *,
    media: Mapping[str, str] | None = None,
    fps: int = 15,
    vram_limit: bool = False,
    lora: Mapping[str, str] | None = None,
) -> str:
    """A row's example of a video model: one call after the other, and a file of each.

    Args:
        row: what it imports, loads and gives.
        calls: argument -> its text in the script, for each call; together they give every argument of the row.
        media: name of a variable -> a file of the data set, a picture or a video.
        fps: of the files.
        vram_limit: see `script`.
        lora: a file of a LoRA, which is loaded before the last call.
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
        f"pipe = {pipeline}.from_pretrained(",
        "    torch_dtype=torch.bfloat16,",
        '    device="cuda",',
        "    model_configs=[",
        *(f"        {_model_config(file)}," for file in row["files"] if file not in tokenizers),
        "    ],",
        *(f"    tokenizer_config={_model_config(file)}," for file in tokenizers),
        *(['    vram_limit=torch.cuda.mem_get_info("cuda")[1] / (1024 ** 3) - 0.5,'] if vram_limit else []),
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


def _model_config(file: Mapping[str, str]) -> str:
    arguments = ", ".join(f'{name}="{value}"' for name, value in file.items())
    return f"ModelConfig({arguments})"
