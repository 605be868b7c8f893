"""Reference images: their tokens follow those of the image, each at a time of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.image import center_crop, cover
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.image_units import encode_each
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux2.config import VAE_FACTOR
from diffsynth_flux.flux2.extension import Network, Stream

MAX_IMAGES = 10
"""Largest number of reference images of a call."""

AREA = 1024 * 1024
"""Area, in pixels, that automatic resizing gives a reference image."""

RESIZED_MULTIPLE = 32
"""Automatic resizing rounds both sides to a multiple of this number of pixels."""

TIME_STEP = 10
"""Distance of reference images on the time axis; the image that is computed is at 0."""


class EditArguments(TypedDict, total=False):
    """Reference images.

    Args:
        edit_image: Image to edit, or a list of up to 10 reference images, which the prompt may mention by number. Every
            result gets all of them.
        edit_image_auto_resize: Whether each is resized and cropped to an area of about 1024 x 1024 pixels; else it is
            only cropped to multiples of 16.
    """

    edit_image: Images
    edit_image_auto_resize: bool


@dataclass(frozen=True, eq=False)
class References:
    """Extension that appends the tokens of reference images.

    Args:
        images: packed latents of each image, `1 c h w`; sizes may differ.
    """

    images: tuple[Float[Tensor, "1 c h w"], ...]

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the images' tokens; see `diffsynth_flux.flux2.extension.Extension`."""
        return dit.append_images(stream, self.placed())

    def placed(self) -> dict[int, Float[Tensor, "1 c h w"]]:
        """Return a dict position on the time axis -> latents: 10 for the first image, 20 for the second, and so on."""
        return {TIME_STEP * (index + 1): image for index, image in enumerate(self.images)}


@unit("references", phase=Phase.ENCODE, only_with="edit_image")
def encode_edit_images(
    vae: Any,
    *,
    edit_image: Images = None,
    edit_image_auto_resize: bool = True,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> References:
    """Return `References` with the packed latents of the reference images."""
    images = (_sized(image, auto_resize=edit_image_auto_resize) for image in map(to_rgb, image_list(edit_image)))
    return References(encode_each(vae, images, tiling=tiling, device=device, dtype=dtype))


def edit_size(image: Image.Image, *, auto_resize: bool) -> tuple[int, int]:
    """Return (height, width) in pixels at which a reference image is encoded.

    Args:
        image: the image.
        auto_resize: whether the area becomes about 1024 x 1024 and the sides multiples of 32; else each side is cut to
            a multiple of 16.
    """
    if not auto_resize:
        return image.height // VAE_FACTOR * VAE_FACTOR, image.width // VAE_FACTOR * VAE_FACTOR
    scale = (AREA / (image.height * image.width)) ** 0.5
    height, width = (
        max(round(side * scale / RESIZED_MULTIPLE), 1) * RESIZED_MULTIPLE for side in (image.height, image.width)
    )
    return height, width


def _sized(image: Image.Image, *, auto_resize: bool) -> Image.Image:
    height, width = edit_size(image, auto_resize=auto_resize)
    fitted = cover(image, height, width, Image.Resampling.LANCZOS) if auto_resize else image
    return center_crop(fitted, height, width)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for reference images that cannot be encoded.

    Raises:
        ValueError: more than 10 images, or one that is smaller than a token.
    """
    images = image_list(values["edit_image"])
    if len(images) > MAX_IMAGES:
        raise ValueError(f"edit_image has {len(images)} images; expected 1 to {MAX_IMAGES}, or None")
    for image in images:
        if min(image.size) < VAE_FACTOR and not values["edit_image_auto_resize"]:
            raise ValueError(
                f"edit_image has an image of {image.width}x{image.height} pixels; expected at least {VAE_FACTOR} on "
                "each side, or edit_image_auto_resize=True"
            )


EDIT = Feature(
    "edit",
    arguments=EditArguments,
    units=(encode_edit_images,),
    conditions={"references": Condition("an image has no frames", batch="separate")},
    check=check,
)
