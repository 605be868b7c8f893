"""Control image whose tokens follow those of the result, for LoRAs that are trained for it: In-Context-Control-Union,
and Layered-Control-V2 for Qwen-Image-Layered.

The text encoder does not get the image, unlike one to edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from PIL import Image

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.images import check_alpha, image_to_tensor
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.features.edit import References


class ContextArguments(TypedDict, total=False):
    """Control image for a LoRA that is trained to follow one.

    Args:
        context_image: Control image, such as edges, depth or a pose, for LoRAs such as In-Context-Control-Union; it is
            scaled to the size of the result by `resize_mode`. Every result gets it. For Layered-Control-V2 it is a
            drawn mask with transparency (RGBA).
    """

    context_image: Image.Image | None


@unit("context", phase=Phase.ENCODE, only_with="context_image")
def encode_context_image(
    vae: Any,
    *,
    context_image: Image.Image | None = None,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> References:
    """Return `References` with the latents of the control image."""
    assert context_image is not None, "the unit runs only with it"
    mode = vae.config.pixel_mode
    pixels = image_to_tensor(context_image, height, width, mode=mode, resize_mode=resize_mode).to(device, dtype)
    return References((vae.encode(pixels, **tiling),))


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for an image without transparency, where the autoencoder takes it.

    Raises:
        ValueError: such an image.
    """
    if (vae := configs["vae"]) is not None and vae.pixel_mode == "RGBA":
        check_alpha("context_image", values["context_image"])


CONTEXT = Feature(
    "context",
    arguments=ContextArguments,
    units=(encode_context_image,),
    conditions={"context": Condition("an image has no frames", batch="separate")},
    check=check,
)
