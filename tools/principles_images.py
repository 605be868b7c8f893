"""Write the images of docs/principles.md to docs/images, with z-image-nano on the CPU; takes about a minute.

Run: uv run --all-packages tools/principles_images.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import diffsynth
from diffsynth.runtime.images import tensor_to_images
from diffsynth.sampling.schedule import z_image_sigmas

FOLDER = Path(__file__).parents[1] / "docs" / "images"
TILE, CAPTION = 96, 18
"""Size of an image of a sheet, and height of the text above it, in pixels."""
COLOURS = {1.0: "#6a737d", 3.0: "#0b5c8c", 6.0: "#9a3412"}
"""Shift -> colour of its line in the chart."""


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Return one image of rows of images, each row with a title at the left, and captions above the columns."""
    left = 84
    size = (left + len(captions) * (TILE + 4), CAPTION + len(rows) * (TILE + 4))
    result = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(result)
    for column, caption in enumerate(captions):
        draw.text((left + column * (TILE + 4) + 2, 3), caption, fill="black")
    for row, (title, images) in enumerate(rows):
        top = CAPTION + row * (TILE + 4)
        draw.multiline_text((0, top + TILE // 2 - 12), title, fill="black")
        for column, image in enumerate(images):
            method = Image.Resampling.NEAREST if image.width < TILE else Image.Resampling.LANCZOS
            result.paste(image.resize((TILE, TILE), method), (left + column * (TILE + 4), top))
    return result


def save(image: Image.Image, path: Path) -> None:
    """Write an image as a PNG of 48 colours, which is a quarter of the size of one in full colour."""
    image.quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)


def channels(latents: Tensor) -> Image.Image:
    """Return an image of the first three channels of latents `1 c h w`, with -3 as black and 3 as white."""
    return tensor_to_images((latents[:, :3] / 3).clamp(-1, 1))[0]


def noise_to_image(pipe: diffsynth.Pipeline, *, num_steps: int = 12, every: int = 2) -> Image.Image:
    """Return a sheet of the latents, the decoded latents and the decoded estimates x0 of every second step."""
    captions, latents, decoded, estimates = [], [], [], []

    def observe(step):
        if step.index % every and step.index != num_steps - 1:
            return
        captions.append(f"sigma {step.sigma_next:.2f}")
        latents.append(channels(step.latents.float()))
        decoded.append(tensor_to_images(pipe.vae.decode(step.latents.float()))[0])
        estimates.append(tensor_to_images(pipe.vae.decode(step.x0.float()))[0])

    pipe("a red apple", seed=0, num_inference_steps=num_steps, on_step=observe)
    return sheet([("latents", latents), ("decoded", decoded), ("estimate\nx0, decoded", estimates)], captions)


def guidance(pipe: diffsynth.Pipeline, *, scales: Sequence[float] = (1, 2, 3, 5, 8, 12)) -> Image.Image:
    """Return a sheet of two prompts with several scales of guidance."""
    rows = [
        (name, [pipe(f"a {name}", seed=4, cfg_scale=float(scale)) for scale in scales])
        for name in ("red apple", "fox face")
    ]
    return sheet(rows, [f"cfg_scale {scale}" for scale in scales])


def steps(pipe: diffsynth.Pipeline, *, counts: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> Image.Image:
    """Return a sheet of one image by two solvers with several numbers of steps."""
    rows = [
        (solver, [pipe("a red apple", seed=0, num_inference_steps=count, solver=solver) for count in counts])
        for solver in ("euler", "dpmpp_2m")
    ]
    return sheet(rows, [f"{count} step{'s' if count > 1 else ''}" for count in counts])


def schedules(num_steps: int = 12) -> str:
    """Return a chart, as SVG, of the noise levels of `num_steps` steps with several shifts."""
    width, height, left, bottom = 560, 260, 44, 34
    across, up = (width - left - 120) / num_steps, height - bottom - 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for level in (0.0, 0.5, 1.0):
        y = 14 + up * (1 - level)
        lines.append(f'<path d="M{left} {y:.1f}H{left + across * num_steps:.1f}" stroke="#e1e4e5"/>')
        lines.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{level}</text>')
    for number, (shift, colour) in enumerate(COLOURS.items()):
        levels = z_image_sigmas(num_steps, shift=shift).tolist()
        points = [(left + across * index, 14 + up * (1 - level)) for index, level in enumerate(levels)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        lines.append(f'<text x="{width - 106}" y="{30 + 20 * number}" fill="{colour}">shift {shift:g}</text>')
    lines.append(f'<text x="{left}" y="{height - 8}">step 0</text>')
    end = left + across * num_steps
    lines.append(f'<text x="{end:.1f}" y="{height - 8}" text-anchor="end">step {num_steps}</text>')
    lines.append('<text x="8" y="12">sigma</text>')
    return "\n".join([*lines, "</svg>", ""])


def main(folder: Path = FOLDER) -> None:
    """Write all images to a folder."""
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)
    save(noise_to_image(pipe), folder / "principles-steps.png")
    save(guidance(pipe), folder / "principles-guidance.png")
    save(steps(pipe), folder / "principles-solvers.png")
    (folder / "principles-schedules.svg").write_text(schedules(), encoding="utf-8")


if __name__ == "__main__":
    main()
