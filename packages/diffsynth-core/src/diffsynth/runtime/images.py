"""Conversion between PIL images and tensors in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_mask, to_rgb, to_rgba
from diffsynth.core.data.image import ResizeMode, fit
from diffsynth.core.finite import is_finite
from diffsynth.errors import NotFinite
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

Images = Image.Image | Sequence[Image.Image] | None
"""The type of an argument that takes one image or several."""

PixelMode = Literal["RGB", "RGBA"]
"""The channels that a network takes of an image: three, or a fourth for transparency."""


def image_to_tensor(
    image: Image.Image, height: int, width: int, *, mode: PixelMode = "RGB", resize_mode: ResizeMode = "stretch"
) -> Float[Tensor, "1 c height width"]:
    """Return an image as an fp32 tensor `1 3 h w` in [-1, 1], scaled to h x w as `resize_mode` says, see `ResizeMode`;
    `core.data.color.to_rgb` converts its mode and colours, transparent pixels over white.

    Args:
        image: of any mode.
        height, width: in pixels.
        mode: "RGB"; or "RGBA" for a tensor `1 4 h w` with alpha, -1 for transparent and 1 for opaque, as
            `core.data.color.to_rgba` has it.
        resize_mode: see `ResizeMode`.

    Raises:
        ValueError: an image that cannot be converted, see `to_rgb`.
    """
    image = to_rgba(image) if mode == "RGBA" else to_rgb(image)
    if image.size != (width, height):
        logger.info("image of %dx%d is scaled to %dx%d (%s)", *image.size, width, height, resize_mode)
        image = fit(image, height, width, resize_mode=resize_mode, resample=Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return rearrange(pixels / 127.5 - 1.0, "h w c -> 1 c h w")


def mask_to_tensor(
    image: Image.Image, height: int, width: int, *, resize_mode: ResizeMode = "stretch"
) -> Float[Tensor, "1 1 height width"]:
    """Return a mask as an fp32 tensor `1 1 h w`: 1 where `image` is at least half white, or, if it has transparency, at
    least half opaque, else 0; scaled to the nearest pixel as `image_to_tensor` scales, with 0 where it pads.

    Raises:
        ValueError: an image that cannot be converted, see `core.data.color.to_mask`.
    """
    grey = fit(to_mask(image), height, width, resize_mode=resize_mode, resample=Image.Resampling.NEAREST)
    levels = torch.from_numpy(np.array(grey, dtype=np.float32))
    return rearrange((levels / 255 >= 0.5).float(), "h w -> 1 1 h w")


def images_expected(batch_size: int) -> str:
    """Return the number of images that a call of `batch_size` results takes, as text: "1", or "1 or 4, one for each
    result".
    """
    return "1" if batch_size == 1 else f"1 or {batch_size}, one for each result"


def image_list(images: Images) -> list[Image.Image]:
    """Return the value of an argument for one image or several as a list; empty for None."""
    if images is None:
        return []
    return [images] if isinstance(images, Image.Image) else list(images)


def images_to_batch(
    images: Image.Image | Sequence[Image.Image] | Tensor,
    *,
    height: int,
    width: int,
    mode: PixelMode = "RGB",
    resize_mode: ResizeMode = "stretch",
) -> Float[Tensor, "b c height width"]:
    """Return one PIL image or several as one fp32 tensor `b c h w` in [-1, 1], scaled as by `image_to_tensor`; a tensor
    is returned as it is.

    Args:
        images: the images.
        height, width: in pixels.
        mode: "RGB", three channels, or "RGBA", four; see `image_to_tensor`.
        resize_mode: see `ResizeMode`.

    Raises:
        ValueError: an empty list, or a tensor whose last three sizes are not the channels, height and width.
        TypeError: neither a tensor nor PIL images.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or tuple(images.shape[1:]) != (len(mode), height, width):
            raise ValueError(
                f"image tensor of shape {tuple(images.shape)}; expected (b, {len(mode)}, {height}, {width})"
            )
        return images
    several = [images] if isinstance(images, Image.Image | str) else list(images)
    if not several:
        raise ValueError("an empty list of images; expected at least one")
    for image in several:
        if not isinstance(image, Image.Image):
            raise TypeError(f"an image is {image!r:.80}; expected a PIL image, a list of them, or a tensor b 3 h w")
    return torch.cat([image_to_tensor(image, height, width, mode=mode, resize_mode=resize_mode) for image in several])


def tensor_to_images(pixels: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Return a list of PIL images, one for each item of a tensor `b c h w`: of mode RGB for three channels and RGBA for
    four; values are clamped to [-1, 1].

    Raises:
        NotFinite: a value is NaN, which no pixel can show.
    """
    check_decoded(pixels)
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return [Image.fromarray(array) for array in rearrange(levels, "b c h w -> b h w c").numpy()]


def check_decoded(values: Tensor) -> None:
    """Raise NotFinite if decoded values hold NaN or infinity, which no pixel can show and no sound can play; do nothing
    on meta. The host waits for the device.

    Raises:
        NotFinite: with the dtype.
    """
    if not values.is_meta and not bool(is_finite(values)):
        raise NotFinite(
            f"the decoded values hold NaN or infinity ({values.dtype}), so no result can be made of them. A float16 "
            f"autoencoder may overflow: use torch.bfloat16 or torch.float32"
        )


def check_alpha(name: str, images: Images) -> None:
    """Raise ValueError for an image without transparency, in an argument for a network that takes it.

    Args:
        name: of the argument.
        images: its value.

    Raises:
        ValueError: an image whose mode and info have no transparency; one that is opaque everywhere passes.
    """
    for image in image_list(images):
        if not image.has_transparency_data:
            raise ValueError(
                f"{name} has an image of mode {image.mode}, without transparency, and the network takes RGBA. Pass "
                'image.convert("RGBA"), which is opaque everywhere, or an image file with transparency'
            )


def check_output(output: Any) -> None:
    """Raise NotFinite if tensors of a call's output hold NaN or infinity: the output itself, the samples of an `Audio`,
    or those of a list of them. Other outputs, such as PIL images, pass.

    Raises:
        NotFinite: see `check_decoded`.
    """
    for part in output if isinstance(output, list | tuple) else [output]:
        values = getattr(part, "samples", part)
        if isinstance(values, Tensor):
            check_decoded(values)
