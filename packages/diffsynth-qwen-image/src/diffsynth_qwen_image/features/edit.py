"""Images to edit: the text encoder reads them with the prompt, and their tokens follow those of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.image import crop_to_multiple
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.image_units import encode_each
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.role import Processor
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.config import TOKEN_FACTOR
from diffsynth_qwen_image.extension import Network, Stream
from diffsynth_qwen_image.prompts import PromptImages

AREA = 1024 * 1024
"""Area, in pixels, that automatic resizing gives an image."""

LISTED_AREA = 384 * 384
"""Area, in pixels, at which the text encoder gets each image of a list."""

LONGEST = 200
"""Most times that the longer side of an image for the text encoder has the shorter; its processor takes no other."""

RESIZED_MULTIPLE = 32
"""Resizing rounds both sides to a multiple of this number of pixels."""

SYSTEM_MESSAGE = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
"""Message before every prompt with images, as in training."""


class EditArguments(TypedDict, total=False):
    """Images to edit.

    Args:
        edit_image: Image to edit, for Qwen-Image-Edit, or a list of images, which the prompt may mention as "Picture
            1", for Qwen-Image-Edit-2509 and later. Every result gets all of them.
        edit_image_auto_resize: Whether each is resized to an area of about 1024 x 1024 pixels; else it is only cropped
            to multiples of 16.
        edit_rope_interpolation: Whether images of another size than the result get positions that are spread over it,
            for LoRAs that are trained in this way.
        zero_cond_t: Whether the images are modulated as images without noise, for Qwen-Image-Edit-2511, which is
            trained in this way.
    """

    edit_image: Images
    edit_image_auto_resize: bool
    edit_rope_interpolation: bool
    zero_cond_t: bool


@dataclass(frozen=True, eq=False)
class References:
    """Extension that appends the tokens of images.

    Args:
        images: scaled latents of each image, `1 c h w`; sizes may differ.
        clean_time: whether they are modulated by the embedding of noise level 0.
        spread: whether their positions are spread over those of the first image.
    """

    images: tuple[Float[Tensor, "1 c h w"], ...]
    clean_time: bool = False
    spread: bool = False

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the images' tokens; see `diffsynth_qwen_image.extension.Extension`."""
        return dit.append_images(stream, self.images, clean_time=self.clean_time, spread=self.spread)


@unit("prompt_images", phase=Phase.SHAPE, only_with="edit_image")
def prepare_prompt_images(
    processor: Any, *, edit_image: Images = None, edit_image_auto_resize: bool = True
) -> PromptImages:
    """Return `PromptImages`: what the text encoder gets of the images, at the sizes of training."""
    listed = not isinstance(edit_image, Image.Image)
    images = [to_rgb(image) for image in image_list(edit_image)]  # upright, before its sides are read
    if area := _area(listed=listed, auto_resize=edit_image_auto_resize):
        images = [_resized(image, area) for image in images]
    return as_prompt_images(
        processor, images, tuple(f"Picture {number}: " if listed else "" for number in range(1, len(images) + 1))
    )


def as_prompt_images(processor: Any, images: Sequence[Image.Image], captions: tuple[str, ...]) -> PromptImages:
    """Return the `PromptImages` of images before a prompt, after the system message of editing.

    Args:
        processor: of Qwen2.5-VL.
        images: in RGB, at the size at which the text encoder gets them.
        captions: text before each image.
    """
    inputs = processor(images=images, return_tensors="pt")
    grids = tuple((int(rows), int(columns)) for _, rows, columns in inputs["image_grid_thw"])
    counts = tuple(rows * columns // processor.merge_size**2 for rows, columns in grids)
    return PromptImages(SYSTEM_MESSAGE, captions, counts, inputs["pixel_values"], grids)


@unit(
    "references",
    phase=Phase.ENCODE,
    only_with="edit_image",
    requires=("processor",),
)
def encode_edit_images(
    vae: Any,
    *,
    edit_image: Images = None,
    edit_image_auto_resize: bool = True,
    edit_rope_interpolation: bool = False,
    zero_cond_t: bool = False,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> References:
    """Return `References` with the latents of the images."""
    images = (
        _resized(image, AREA) if edit_image_auto_resize else crop_to_multiple(image, TOKEN_FACTOR)
        for image in map(to_rgb, image_list(edit_image))
    )
    latents = encode_each(vae, images, tiling=tiling, device=device, dtype=dtype)
    return References(latents, clean_time=zero_cond_t, spread=edit_rope_interpolation)


def resized_size(width: int, height: int, area: int) -> tuple[int, int]:
    """Return (width, height) in pixels, multiples of 32, of about `area` pixels and the aspect ratio of the arguments.

    Args:
        width, height: of the image.
        area: number of pixels.
    """
    ratio = width / height
    wanted = (area * ratio) ** 0.5
    new_width, new_height = (
        max(round(side / RESIZED_MULTIPLE), 1) * RESIZED_MULTIPLE for side in (wanted, wanted / ratio)
    )
    return new_width, new_height


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for images that cannot be encoded.

    Raises:
        ValueError: an image that is smaller than a token, and is not resized, or one that is too long and narrow.
    """
    listed = not isinstance(values["edit_image"], Image.Image)
    area = _area(listed=listed, auto_resize=values["edit_image_auto_resize"])
    for image in image_list(values["edit_image"]):
        if min(image.size) < TOKEN_FACTOR and not values["edit_image_auto_resize"]:
            raise ValueError(
                f"edit_image has an image of {image.width}x{image.height} pixels; expected at least {TOKEN_FACTOR} on "
                "each side, or edit_image_auto_resize=True"
            )
        sides = resized_size(*image.size, area) if area else image.size
        if max(sides) > LONGEST * min(sides):
            raise ValueError(
                f"edit_image has an image of {image.width}x{image.height} pixels; expected a longer side of at most "
                f"{LONGEST} times the shorter: crop it"
            )


PROCESSOR = Processor(
    source="Qwen/Qwen-Image-Edit:processor/",
    loader="transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
    optional=True,
)
"""Role of the image processor of Qwen2.5-VL."""

EDIT = Feature(
    "edit",
    arguments=EditArguments,
    roles={"processor": PROCESSOR},
    units=(prepare_prompt_images, encode_edit_images),
    conditions={"references": Condition("an image has no frames", batch="separate")},
    check=check,
)


def _area(*, listed: bool, auto_resize: bool) -> int | None:
    """Return the area, in pixels, to which images are resized for the text encoder; None for their own sizes."""
    if listed:
        return LISTED_AREA
    return AREA if auto_resize else None


def _resized(image: Image.Image, area: int) -> Image.Image:
    return image.resize(resized_size(*image.size, area), Image.Resampling.LANCZOS)
