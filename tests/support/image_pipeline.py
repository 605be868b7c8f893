"""Toy pipelines with image and video output, as the model `toy-1` for tests of the command line."""

from __future__ import annotations

import torch
from PIL import Image

from diffsynth import _discovery
from diffsynth._discovery import Catalog, Declared, Plugin
from diffsynth.models.plugin import SOLVERS, WRITERS
from diffsynth.runtime.unit import unit
from diffsynth.spec import ModelSpec
from toy_pipeline import ToyNet, ToyPipeline


@unit("tint")
def read_image(*, input_image: Image.Image | list[Image.Image] | None = None):
    return None if input_image is None else input_image


@unit("output")
def to_images(*, latents, tint):
    size = (latents.shape[3] * 8, latents.shape[2] * 8)
    levels = latents.mean(dim=(1, 2, 3)).clamp(0, 1).tolist()
    return [Image.new("L", size, round(255 * level)) if tint is None else tint for level in levels]


class ImagePipeline(ToyPipeline):
    units = (*ToyPipeline.units, read_image)
    output_units = (to_images,)


@unit("output")
def to_videos(*, latents, tint):
    """Return three frames for each sample, each darker than the last; with an input clip, its first three frames."""
    size = (latents.shape[3] * 8, latents.shape[2] * 8)
    shades = [Image.new("RGB", size, (200 - 50 * index,) * 3) for index in range(3)]
    return [shades if tint is None else list(tint[:3]) for _ in latents]


class VideoPipeline(ImagePipeline):
    output_units = (to_videos,)


class LayersPipeline(VideoPipeline):
    """Returns three images for each sample."""

    output_kind = "image"


def image_pipeline(kind: type[ImagePipeline] = ImagePipeline, **files) -> ImagePipeline:
    pipe = kind({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32, component_files=files)
    return pipe.named("toy-1", {"height": 16})


def catalog(task: str = "text-to-image", pipeline: str = "ImagePipeline", **facts) -> Catalog:
    """Return a catalog of one model, `toy-1`, of plugin `toy`, and the writers of core."""
    spec = ModelSpec(
        name="toy-1",
        hub_id="Owner/Toy-1",
        family="toy",
        task=task,
        pipeline=pipeline if ":" in pipeline else f"image_pipeline:{pipeline}",
        components={"dit": "Owner/Toy-1:dit.safetensors"},
    )
    plugins = (Plugin("toy", "diffsynth-toy", "1.2"),)
    models = (Declared(spec, "toy", "diffsynth-toy", "1.2"),)
    solvers = tuple(Declared(solver, "core", "diffsynth-core", "1.2") for solver in SOLVERS)
    writers = tuple(Declared(writer, "core", "diffsynth-core", "1.2") for writer in WRITERS)
    return Catalog(**{"plugins": plugins, "models": models, "solvers": solvers, "writers": writers, **facts})


def use(monkeypatch, found: Catalog) -> None:
    """Make this catalog the result of discovery."""
    monkeypatch.setattr(_discovery, "_discovered", _discovery._Discovered(found, _discovery._current().manager))
