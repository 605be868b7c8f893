"""Sketches that an image follows: everything of this conditioning, as one feature of Z-Image's pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
import torch.nn.functional as F
from PIL import Image

from diffsynth import Feature, Phase, Role, unit
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.runtime.feature import Condition
from diffsynth.runtime.images import image_to_tensor

ROLE = "sketch_controlnet"


class SketchArguments(TypedDict, total=False):
    """Sketches that the image follows.

    Args:
        sketches: Sketch with its ControlNet, scale, start and end, or a list of them; None uses no ControlNet.
    """

    sketches: ControlNetInput | Sequence[ControlNetInput] | None


@dataclass(frozen=True, eq=False)
class Sketch:
    """One sketch of a call.

    Args:
        pixels: grey image in [-1, 1], `1 1 height width`.
        settings: the ControlNet, scale, start and end.
    """

    pixels: torch.Tensor
    settings: ControlNetInput


@dataclass(frozen=True, eq=False)
class SketchHints:
    """Extension of Z-Image's transformer that adds hints to its layers; see `diffsynth_zimage.extension`."""

    sketches: tuple[Sketch, ...]

    def active(self, step):
        """Return a list of the sketches that are used in a step: between `start` and `end`, and with a scale."""
        used = [each for each in self.sketches if each.settings.scale != 0]
        return [each for each in used if each.settings.is_active(step.index, step.num_steps)]

    def __call__(self, dit, stream):
        """Return the stream with the hints of the active sketches as residuals of evenly spaced layers."""
        rows, columns = stream.grid
        tokens = stream.image[:, : rows * columns]
        for each in self.active(stream.step):
            hints = stream.step.networks[ROLE][each.settings.controlnet_id](tokens, each.pixels)
            for index, hint in enumerate(hints):
                layer = index * len(dit.layers) // len(hints)
                stream = stream.with_residual("layers", layer, partial(padded, each.settings.scale * hint))
        return stream


def padded(hint, tokens):
    """Return the hint as a tensor of the shape of `tokens`: behind those of the image are padding and the caption."""
    return F.pad(hint, (0, 0, 0, tokens.shape[1] - hint.shape[1]))


@unit("sketch_hints", phase=Phase.ENCODE, requires=(ROLE,), only_with="sketches")
def read_sketches(
    *,
    sketches: ControlNetInput | Sequence[ControlNetInput] | None = None,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
):
    """Return `SketchHints` with the pixels of the call's sketches."""
    read = []
    for each in as_list(sketches):
        pixels = image_to_tensor(each.image, height, width).mean(1, keepdim=True)
        read.append(Sketch(pixels.to(device, dtype), each))
    return SketchHints(tuple(read))


def check(configs, values):
    """Raise TypeError for what is no sketch, and ValueError for a sketch of a ControlNet that is not there or does not
    fit the transformer.
    """
    dit, networks = configs["dit"], configs[ROLE] or ()
    for each in as_list(values["sketches"]):
        if not isinstance(each, ControlNetInput) or not isinstance(each.image, Image.Image):
            raise TypeError(f"sketches has {each!r}: expected ControlNetInput(image=...) with a PIL image")
        if each.controlnet_id >= len(networks):
            raise ValueError(f"sketches: controlnet_id={each.controlnet_id}, and {len(networks)} are loaded")
        config = networks[each.controlnet_id]
        if config.dim != dit.dim or dit.n_layers % config.depth:
            raise ValueError(
                f"sketches: ControlNet {each.controlnet_id} is for a transformer of width {config.dim} with a multiple "
                f"of {config.depth} layers; this one has width {dit.dim} and {dit.n_layers} layers"
            )


def roles_at(step, values):
    """Return a tuple of the roles of the ControlNets that a step calls."""
    hints = values.get("sketch_hints")
    active = [] if hints is None else hints.active(step)
    return tuple(dict.fromkeys(f"{ROLE}[{each.settings.controlnet_id}]" for each in active))


def as_list(sketches):
    """Return the argument `sketches` as a list."""
    if sketches is None:
        return []
    return list(sketches) if isinstance(sketches, list | tuple) else [sketches]


SKETCH = Feature(
    "sketch",
    arguments=SketchArguments,
    roles={ROLE: Role(architectures=("sketch_controlnet",), optional=True, many=True)},
    loop_roles=(ROLE,),
    units=(read_sketches,),
    conditions={"sketch_hints": Condition("an image has no frames", batch="separate")},
    check=check,
    roles_at=roles_at,
)
