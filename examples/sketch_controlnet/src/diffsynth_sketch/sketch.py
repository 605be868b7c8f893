"""Sketches that an image follows: everything of this conditioning, as one feature of Z-Image's pipeline."""

from functools import partial
from typing import TypedDict

import torch
import torch.nn.functional as F

from diffsynth import Feature, Phase, Role, unit
from diffsynth.runtime.controlnet import (
    ControlNetContext,
    ControlNetContexts,
    ControlNetInputs,
    active_roles,
    config_for,
    listed,
)
from diffsynth.runtime.feature import Condition
from diffsynth.runtime.images import image_to_tensor

ROLE = "sketch_controlnet"


class SketchArguments(TypedDict, total=False):
    """Sketches that the image follows.

    Args:
        sketches: Sketch with its ControlNet, scale, start and end, or a list of them; None uses no ControlNet.
    """

    sketches: ControlNetInputs


class SketchHints(ControlNetContexts):
    """Extension of Z-Image's transformer that adds hints to its layers; see `diffsynth_zimage.extension`."""

    def __call__(self, dit, stream):
        """Return the stream with the hints of the active sketches as residuals of evenly spaced layers."""
        rows, columns = stream.grid
        tokens = stream.image[:, : rows * columns]
        for each in self.active(stream.step):
            hints = stream.step.networks[ROLE][each.settings.controlnet_id](tokens, each.latents)
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
    sketches: ControlNetInputs = None,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
):
    """Return `SketchHints` with the pixels of the call's sketches."""
    read = []
    for each in listed(sketches):
        pixels = image_to_tensor(each.image, height, width).mean(1, keepdim=True)
        read.append(ControlNetContext(pixels.to(device, dtype), each))
    return SketchHints(tuple(read))


def check(configs, values):
    """Raise TypeError for an input without a sketch, and ValueError for a ControlNet that is not there or does not fit
    the transformer.
    """
    dit, networks = configs["dit"], configs[ROLE] or ()
    for each in listed(values["sketches"]):
        if each.image is None:
            raise TypeError(f"sketches has {each!r}: expected ControlNetInput(image=...) with a PIL image")
        config = config_for(each, networks, argument="sketches")
        if config.dim != dit.dim or dit.n_layers % config.depth:
            raise ValueError(
                f"sketches: ControlNet {each.controlnet_id} is for a transformer of width {config.dim} with a multiple "
                f"of {config.depth} layers; this one has width {dit.dim} and {dit.n_layers} layers"
            )


def roles_at(step, values):
    """Return a tuple of the roles of the ControlNets that a step calls."""
    return active_roles(ROLE, values.get("sketch_hints"), step)


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
