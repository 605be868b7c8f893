"""Pipelines without a prompt for tests: a label determines a tensor or a sound."""

from __future__ import annotations

import enum
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from diffsynth.core.data.audio import Audio
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments
from diffsynth.runtime.role import Role
from diffsynth.runtime.unit import unit
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.schedule import z_image_sigmas
from toy_pipeline import ToyNet

SAMPLE_RATE = 8000


@unit("sigmas")
def schedule(*, num_inference_steps: int):
    return z_image_sigmas(num_inference_steps)


@unit("colour")
def encode_label(*, label: int | list[int] = 0):
    """Return the level of each sample.

    Args:
        label: class of the sample, at least 0 and at most 9, or a list of classes for several results.
    """
    return torch.tensor(label) / 10


@unit("latents", random=True)
def initial_signal(*, num_samples: int = 6, seeds, device, dtype):
    return initial_noise((2, 1, num_samples), seeds, dtype=dtype, device=device)


@unit("output")
def to_tensors(*, latents):
    return list(latents[:, :, 0])


class LabelPipeline(Pipeline):
    """Returns a tensor of two channels whose values are a tenth of the label."""

    roles = {"dit": Role(architectures=("toy_net",))}
    units = (schedule, encode_label, initial_signal)
    output_units = (to_tensors,)
    loop = LoopArguments(num_inference_steps=4)
    per_image = ("label",)

    def velocity(self, latents, sigma, *, colour):
        return self.dit(latents, sigma, colour)


@unit("output")
def to_sound(*, latents):
    return [Audio(samples, SAMPLE_RATE) for samples in latents[:, :, 0]]


class SoundPipeline(LabelPipeline):
    """Returns sound of two channels whose samples are a tenth of the label."""

    output_units = (to_sound,)
    output_kind = "audio"


@unit("output")
def to_mapping(*, latents):
    return {"values": latents[:, :, 0]}


class MappingPipeline(LabelPipeline):
    """Returns one mapping of tensors for all samples of a call."""

    output_units = (to_mapping,)


class Mood(enum.Enum):
    CALM = "calm"
    WILD = "wild"


@dataclass
class Spot:
    """A position and an image."""

    x: float
    image: Image.Image | None = None


@unit("inputs")
def read_inputs(
    *,
    text: str = "",
    maybe: str | None = None,
    flag: bool = False,
    scale: float = 1.0,
    pair: tuple[int, int] = (1, 2),
    levels: list[float] | None = None,
    counts: dict[str, int] | None = None,
    mood: Mood | None = None,
    image: Image.Image | None = None,
    images: list[Image.Image] | None = None,
    either: Image.Image | list[Image.Image] | None = None,
    spot: Spot | None = None,
    anything=None,
    watch: Callable[[int], None] | None = None,
):
    """Return the factor.

    Args:
        scale: factor, above 0.
    """
    return scale


class TypedPipeline(LabelPipeline):
    """Takes an argument of each type."""

    units = (*LabelPipeline.units, read_inputs)


def label_pipeline(kind: type[LabelPipeline] = LabelPipeline) -> LabelPipeline:
    return kind({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32).named("toy-1", {})


def write_lines(output, path, *, record, **settings):
    """Write a tensor as JSON lines, compressed: the record and the settings, then the values."""
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"{path} cannot be written as lines: {type(output).__name__}")
    lines = [json.dumps([record, settings]), *(json.dumps(row) for row in output.tolist())]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
