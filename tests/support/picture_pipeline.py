"""The toy pipeline, drawing grey pictures; what `diffsynth.load` gives in tests of the program."""

from __future__ import annotations

import torch
from PIL import Image

from diffsynth import _discovery
from diffsynth._discovery import Catalog, Declared, Plugin
from diffsynth.runtime.unit import unit
from diffsynth.spec import ModelSpec
from toy_pipeline import ToyNet, ToyPipeline


@unit("tint")
def read_image(*, input_image: Image.Image | list[Image.Image] | None = None):
    return None if input_image is None else input_image


@unit("output")
def draw(*, latents, tint):
    size = (latents.shape[3] * 8, latents.shape[2] * 8)
    levels = latents.mean(dim=(1, 2, 3)).clamp(0, 1).tolist()
    return [Image.new("L", size, round(255 * level)) if tint is None else tint for level in levels]


class PicturePipeline(ToyPipeline):
    units = (*ToyPipeline.units, read_image)
    output_units = (draw,)


@unit("output")
def film(*, latents, tint):
    """Three frames, each darker than the one before; of a given clip, the first three."""
    size = (latents.shape[3] * 8, latents.shape[2] * 8)
    shades = [Image.new("RGB", size, (200 - 50 * index,) * 3) for index in range(3)]
    return [shades if tint is None else list(tint[:3]) for _ in latents]


class VideoPipeline(PicturePipeline):
    output_units = (film,)


def picture_pipeline(kind: type[PicturePipeline] = PicturePipeline, **files) -> PicturePipeline:
    pipe = kind({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32, component_files=files)
    return pipe.named("toy-1", {"height": 16})


def catalog(task: str = "text-to-image", pipeline: str = "PicturePipeline", **facts) -> Catalog:
    """One model, `toy-1`, of plugin `toy`."""
    spec = ModelSpec(
        name="toy-1",
        hub_id="Owner/Toy-1",
        family="toy",
        task=task,
        pipeline=f"picture_pipeline:{pipeline}",
        components={"dit": "Owner/Toy-1:dit.safetensors"},
    )
    plugins = (Plugin("toy", "diffsynth-toy", "1.2"),)
    models = (Declared(spec, "toy", "diffsynth-toy", "1.2"),)
    return Catalog(**{"plugins": plugins, "models": models, **facts})


def use(monkeypatch, found: Catalog) -> None:
    """Let discovery have found this."""
    monkeypatch.setattr(_discovery, "_discovered", _discovery._Discovered(found, _discovery._current().manager))
