"""Control image of FLUX.1-Depth and -Canny: its latents are channels beside those of the noised latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature, whole
from diffsynth.runtime.images import image_to_tensor
from diffsynth.runtime.unit import Phase, unit


class ControlArguments(TypedDict, total=False):
    """Control image.

    Args:
        control_image: Depth map for FLUX.1-Depth, or edges for FLUX.1-Canny; scaled to the size of the result by
            `resize_mode`.
    """

    control_image: Image.Image | None


@unit("control_latents", phase=Phase.ENCODE, only_with="control_image")
def encode_control_image(
    vae: Any,
    *,
    control_image: Image.Image | None = None,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "1 c h w"]:
    """Return the latents `1 c h w` of the control image."""
    assert control_image is not None, "the unit runs only with it"
    pixels = image_to_tensor(control_image, height, width, resize_mode=resize_mode).to(device, dtype)
    return vae.encode(pixels, **tiling)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for a control image that the network does not take, or that is missing.

    Raises:
        ValueError: the network takes none, or needs one.
    """
    image, config = values["control_image"], configs["dit"]
    if config is None:
        return
    takes = config.condition_channels == config.latent_channels
    if image is not None and not takes:
        raise ValueError(
            "control_image is given, but this network takes none; load FLUX.1-Depth-dev or FLUX.1-Canny-dev, or pass "
            "controlnet_inputs for a ControlNet"
        )
    if image is None and takes:
        raise ValueError("this network needs a control image; pass control_image")


CONTROL = Feature(
    "control",
    arguments=ControlArguments,
    units=(encode_control_image,),
    conditions={"control_latents": Condition(whole)},
    check=check,
)
