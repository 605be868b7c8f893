"""Check and encoding of the control images of a call, for both kinds of ControlNets."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from diffsynth.core.data.image import ResizeMode
from diffsynth.errors import MissingComponent
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.controlnet import (
    ControlNetContext,
    ControlNetInputs,
    check_image,
    check_mask,
    config_for,
    encode_control_image,
    listed,
)
from diffsynth.runtime.feature import Configs


def encode_inputs(
    vae: Any,
    inputs: ControlNetInputs,
    *,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[ControlNetContext, ...]:
    """Return the encoded control images of a call, a tuple of a `ControlNetContext` for each.

    Args:
        vae: the autoencoder.
        inputs: of the call.
        height, width: of the result, in pixels.
        resize_mode: how an image of another aspect ratio is scaled to it.
        tiling: arguments of `vae.encode`.
        device, dtype: of the latents.
    """
    size = {"height": height, "width": width, "resize_mode": resize_mode}
    encode = functools.partial(encode_control_image, vae, **size, tiling=tiling, device=device, dtype=dtype)
    return tuple(ControlNetContext(encode(each), each) for each in listed(inputs))


def check_inputs(configs: Configs, values: Mapping[str, Any], *, role: str, other: str) -> None:
    """Raise an error for control images that no loaded ControlNet takes.

    Args:
        configs: role -> config.
        values: of the call.
        role: of the ControlNets; their argument is `<role>_inputs`.
        other: the role of the other kind of ControlNets.

    Raises:
        MissingComponent: no ControlNet of the role is loaded.
        ValueError: the transformer is layered, an index of no ControlNet, an input without an image or with two, or a
            mask that is missing or not taken.
    """
    argument = f"{role}_inputs"
    inputs, networks, dit = listed(values[argument]), configs[role], configs["dit"]
    if not inputs:
        return
    if networks is None:
        remedy = "add its file to model_configs"
        if configs[other] is not None:
            remedy = f"the loaded ControlNets are of another kind: pass {other}_inputs in its place"
        raise MissingComponent(f"argument {argument!r} needs {role}, which is not loaded; {remedy}")
    if dit is not None and dit.layered:
        raise ValueError(
            f"{argument}: ControlNets are trained for Qwen-Image, and the transformer is Qwen-Image-Layered; load "
            "Qwen-Image, or leave the argument out"
        )
    for each in inputs:
        check_image(each, argument=argument)
        check_mask(each, inpaints=config_for(each, networks, argument=argument).inpaints, argument=argument)
