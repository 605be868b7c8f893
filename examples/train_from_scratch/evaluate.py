"""Evaluate z-image-nano on captions in trained phrasings and in phrasings that training never used.

    python examples/train_from_scratch/evaluate.py                      # the model in the wheel
    python examples/train_from_scratch/evaluate.py --weights runs/nano  # weights just trained

An image is counted as right if its nearest training image (squared error, averaged to 16x16 pixels) is the one of the
caption. Writes `evaluation.json`, `samples.png` (32 images) and, with `--loss`, `loss.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import diffsynth
from diffsynth.core.data.image import read_image
from diffsynth.core.loader.config import ModelConfig
from diffsynth.runtime.images import image_to_tensor, tensor_to_images
from diffsynth.runtime.progress import no_progress
from diffsynth_train.data.dataset import fill_template

SEEDS = (0, 1)
UNSEEN = ("please draw {article} {caption}", "{caption} emoji")
SHEET = 8


def main() -> None:
    """Evaluate and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with dit, text_encoder and vae; default: the wheel's")
    parser.add_argument("--vae", type=Path, help="another autoencoder file; used with --weights")
    parser.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer"), help="used with --weights")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--loss", type=Path, help="a loss.csv to plot")
    parser.add_argument("--limit", type=int, help="only this many captions, evenly spread")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--cfg-scale", type=float, help="default: the model's own")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()

    pipe = load(arguments)
    settings = {"num_inference_steps": arguments.steps, "cfg_scale": arguments.cfg_scale}
    settings = {name: value for name, value in settings.items() if value is not None}
    captions, references = read_data(arguments.data)
    every = max(1, len(captions) // arguments.limit) if arguments.limit else 1
    wanted = list(range(0, len(captions), every))
    report = {
        "captions": len(captions),
        "asked": len(wanted),
        "settings": settings,
        "device": str(pipe.device),
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "reconstruction_mse": reconstruction_error(pipe, references, arguments.batch),
    }
    generated = {}
    for template in ("{caption}", *UNSEEN):
        right, asked = 0, 0
        for seed in SEEDS if template == "{caption}" else SEEDS[:1]:
            prompts = [fill_template(template, captions[index]) for index in wanted]
            images = generate_all(pipe, prompts, seed, arguments.batch, settings)
            generated.setdefault(template, images)
            right += (nearest(images, references) == torch.tensor(wanted)).sum().item()
            asked += len(wanted)
        report[f"right: {template}"] = right / asked
        print(f"{template}: {right} of {asked}, {right / asked:.1%}", flush=True)
    report["seconds_per_picture"] = time_one(pipe, captions[wanted[0]], settings)
    report["timed_on"] = f"{platform.machine()}, {torch.get_num_threads()} threads, {pipe.device}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    contact_sheet(generated["{caption}"], [captions[index] for index in wanted]).save(arguments.output / "samples.png")
    if arguments.loss:
        loss_curve(arguments.loss).save(arguments.output / "loss.png")
    print(json.dumps(report, indent=2))


def load(arguments: argparse.Namespace) -> diffsynth.Pipeline:
    """Return the model in the wheel, or the same pipeline with the weights in `--weights`."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.weights is None:
        return diffsynth.load("z-image-nano", device=arguments.device, torch_dtype=dtype)
    record = diffsynth.registry.get("z-image-nano")
    files = [arguments.weights / "dit.safetensors", arguments.weights / "text_encoder.safetensors"]
    files.append(arguments.vae or arguments.weights / "vae.safetensors")
    pipe = diffsynth.spec.resolve(record.pipeline).from_pretrained(
        torch_dtype=dtype,
        device=arguments.device,
        model_configs=[ModelConfig(path=str(file)) for file in files],
        tokenizer_config=ModelConfig(path=str(arguments.tokenizer)),
    )
    return pipe.named(record.name, record.defaults)


def read_data(folder: Path) -> tuple[list[str], torch.Tensor]:
    """Return the captions, and the images `n 3 128 128` in [-1, 1]."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    images = [image_to_tensor(read_image(folder / row["image"]), 128, 128) for row in rows]
    return [row["prompt"] for row in rows], torch.cat(images)


@torch.no_grad()
def reconstruction_error(pipe: diffsynth.Pipeline, images: torch.Tensor, batch: int) -> float:
    """Return the mean squared error of the autoencoder over the dataset, for values in [-1, 1]."""
    total = 0.0
    for chunk in images.split(batch):
        image = chunk.to(pipe.device, pipe.dtype)
        total += (pipe.vae(image).float() - image.float()).square().mean(dim=(1, 2, 3)).sum().item()
    return total / len(images)


def generate_all(
    pipe: diffsynth.Pipeline, prompts: list[str], seed: int, batch: int, settings: dict[str, float]
) -> torch.Tensor:
    """Return one image per prompt, all with one seed, `n 3 h w` on the CPU."""
    return torch.cat(list(_batches(pipe, prompts, seed, batch, settings)))


def _batches(
    pipe: diffsynth.Pipeline, prompts: list[str], seed: int, batch: int, settings: dict[str, float]
) -> Iterator[torch.Tensor]:
    for begin in range(0, len(prompts), batch):
        chunk = prompts[begin : begin + batch]
        seeds = [seed] * len(chunk)
        yield pipe(chunk, seed=seeds, output_type="tensor", progress_bar_cmd=no_progress, **settings).float().cpu()


def nearest(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the index of the reference image nearest to each image, at 16x16 pixels."""
    return torch.cdist(_small(images.clamp(-1, 1)), _small(references)).argmin(dim=1)


def _small(images: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(images, 16).flatten(1)


def time_one(pipe: diffsynth.Pipeline, prompt: str, settings: dict[str, float]) -> float:
    """Return the seconds of one call, after one warm-up call."""
    for _ in range(2):
        started = time.perf_counter()
        pipe(prompt, seed=0, progress_bar_cmd=no_progress, **settings)
    return time.perf_counter() - started


def contact_sheet(images: torch.Tensor, captions: list[str], count: int = 32) -> Image.Image:
    """Return a sheet of images in rows of eight, each above its caption."""
    chosen = torch.linspace(0, len(captions) - 1, min(count, len(captions))).long().tolist()
    cell, line = 136, 16
    sheet = Image.new("RGB", (SHEET * cell, math.ceil(len(chosen) / SHEET) * (cell + line)), "white")
    pen = ImageDraw.Draw(sheet)
    for position, (index, image) in enumerate(zip(chosen, tensor_to_images(images[chosen]), strict=True)):
        left, top = position % SHEET * cell, position // SHEET * (cell + line)
        sheet.paste(image, (left + 4, top + 4))
        pen.text((left + 4, top + cell), captions[index][:21], fill="black")
    return sheet


def loss_curve(path: Path, size: tuple[int, int] = (800, 360)) -> Image.Image:
    """Return a plot of the loss over steps, on a logarithmic scale."""
    with path.open(encoding="utf-8", newline="") as file:
        points = [(int(row["step"]), math.log10(float(row["loss"]))) for row in csv.DictReader(file)]
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 20, size[0] - 20, size[1] - 40
    low, high, last = min(y for _, y in points), max(y for _, y in points), points[-1][0]
    line = [
        (left + (right - left) * x / last, bottom - (bottom - top) * (y - low) / ((high - low) or 1)) for x, y in points
    ]
    pen.rectangle((left, top, right, bottom), outline="grey")
    pen.line(line, fill="black", width=2)
    pen.text((4, top), f"{10**high:.3g}", fill="black")
    pen.text((4, bottom - 10), f"{10**low:.3g}", fill="black")
    pen.text((left, bottom + 10), "0", fill="black")
    pen.text((right - 110, bottom + 10), f"{last} steps; log loss", fill="black")
    return image


if __name__ == "__main__":
    main()
