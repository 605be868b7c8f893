"""Control image whose tokens follow those of the result, for LoRAs that are trained for it (In-Context-Control-Union).

The text encoder does not get the image, unlike one to edit.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from PIL import Image

from diffsynth.runtime.feature import Condition, Feature
from diffsynth.runtime.image_units import ignored_tiles, image_tiling
from diffsynth.runtime.images import image_to_tensor
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.features.edit import References


class ContextArguments(TypedDict, total=False):
    """Control image for a LoRA that is trained to follow one.

    Args:
        context_image: Control image, such as edges, depth or a pose, for LoRAs such as In-Context-Control-Union; it is
            scaled to cover the result. Every result gets it.
    """

    context_image: Image.Image | None


@unit("context", phase=Phase.ENCODE, only_with="context_image", switches={"tiled": True}, ignores=ignored_tiles)
def encode_context_image(
    vae: Any,
    *,
    context_image: Image.Image | None = None,
    height: int,
    width: int,
    tiled: bool | None,
    tile_size: int | tuple[int, int],
    tile_stride: int | tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> References:
    """Return `References` with the latents of the control image."""
    assert context_image is not None, "the unit runs only with it"
    pixels = image_to_tensor(context_image, height, width).to(device, dtype)
    return References((vae.encode(pixels, **image_tiling(tiled, tile_size, tile_stride)),))


CONTEXT = Feature(
    "context",
    arguments=ContextArguments,
    units=(encode_context_image,),
    conditions={"context": Condition("an image has no frames", batch="separate")},
)
