"""Inpainting with a network that was not trained for it: outside of a mask, the velocity leads to the input image.

A pipeline lists the feature `INPAINT` and has a unit that writes `input_latents`. The loop applies `toward_input` to
the guided velocity, so that no guidance changes what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_mask
from diffsynth.core.data.image import ResizeMode, fit
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.images import Images, image_list, images_expected
from diffsynth.runtime.unit import unit
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_ORIENTATION, _FIRST_TURNED = 0x0112, 5
"""The EXIF tag of an image's orientation, and its first value with width and height exchanged."""


class InpaintArguments(TypedDict, total=False):
    """Mask for inpainting the input image.

    Args:
        inpaint_mask: Image that is white where `input_image` changes and black where it is kept, or a list of one per
            result; it is scaled as the input image is. None changes all of it.
        inpaint_blur_size: Radius of a Gaussian blur of the mask, in latent pixels, at least 1; None does not blur it.
        inpaint_blur_sigma: Standard deviation of the blur in latent pixels, above 0; given together with the radius.
    """

    inpaint_mask: Images
    inpaint_blur_size: int | None
    inpaint_blur_sigma: float | None


@dataclass(frozen=True, eq=False)
class Inpainting:
    """The part of an image that changes, and what the rest becomes.

    Args:
        mask: 1 where the image changes, 0 where it is kept; values between blend the two velocities. It is the same for
            all layers of an image.
        input_latents: latents of the input image, or of its layers.
    """

    mask: Float[Tensor, "#b 1 h w"]
    input_latents: Float[Tensor, "b c *t h w"]


def toward_input(
    velocity: Float[Tensor, "b c *t h w"],
    latents: Float[Tensor, "b c *t h w"],
    sigma: Float[Tensor, "b"],
    inpainting: Inpainting | None,
) -> Float[Tensor, "b c *t h w"]:
    """Return the velocity, a tensor of the shape of `latents`; outside of the mask it is `(latents - x0) / sigma`,
    which leads to the input latents `x0` in a straight line.

    Args:
        velocity: of the network, `noise - x0`.
        latents: at the noise level.
        sigma: noise levels, fp32, above 0.
        inpainting: mask and input latents; None returns `velocity` itself.
    """
    if inpainting is None:
        return velocity
    kept = (latents.float() - inpainting.input_latents.float()) / sigma.view(-1, *[1] * (latents.ndim - 1))
    mask = inpainting.mask if latents.ndim == 4 else inpainting.mask[:, :, None]
    return torch.lerp(kept, velocity.float(), mask.expand_as(kept))


def check_masks(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless a call has one mask, or as many as results."""
    count, batch_size = len(image_list(values["inpaint_mask"])), values["batch_size"]
    if count not in (1, batch_size):
        raise ValueError(f"inpaint_mask has {count} images; expected {images_expected(batch_size)}")


@unit("inpainting", only_with="inpaint_mask", check=check_masks)
def prepare_inpainting(
    *,
    inpaint_mask: Images = None,
    inpaint_blur_size: int | None = None,
    inpaint_blur_sigma: float | None = None,
    input_latents: Float[Tensor, "b c *t h w"],
    height: int,
    width: int,
    resize_mode: ResizeMode = "stretch",
    device: torch.device,
) -> Inpainting:
    """Return an `Inpainting` with the mask at the size of the latents, each value the mean of a latent pixel's area."""
    masks = torch.cat([_mask(mask, height, width, resize_mode) for mask in image_list(inpaint_mask)]).to(device)
    if len(masks) not in (1, len(input_latents)):
        raise ValueError(f"inpaint_mask has {len(masks)} images; expected {images_expected(len(input_latents))}")
    masks = F.adaptive_avg_pool2d(masks, tuple(input_latents.shape[-2:]))
    if inpaint_blur_size is not None and inpaint_blur_sigma is not None:
        masks = gaussian_blur(masks, radius=inpaint_blur_size, sigma=inpaint_blur_sigma)
    return Inpainting(masks, input_latents)


def gaussian_blur(x: Float[Tensor, "b c h w"], *, radius: int, sigma: float) -> Float[Tensor, "b c h w"]:
    """Return `x` convolved with a Gaussian over each channel, a tensor of its shape; pixels at the edges are repeated.

    Args:
        x: images.
        radius: of the kernel, in pixels; it has `2 * radius + 1` pixels a side.
        sigma: standard deviation in pixels, above 0.
    """
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum()).to(x).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), kernel.mT, groups=x.shape[1])


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for a mask that no input image fits, or a blur without a mask.

    Raises:
        ValueError: a mask without `input_image`, a blur without a mask, or half of its arguments.
    """
    mask, size, sigma = (values[name] for name in ("inpaint_mask", "inpaint_blur_size", "inpaint_blur_sigma"))
    if (size is None) != (sigma is None):
        raise ValueError(
            f"inpaint_blur_size={size!r} and inpaint_blur_sigma={sigma!r}: expected both, or neither for no blur"
        )
    if mask is None:
        if size is not None:
            raise ValueError("inpaint_blur_size is given without inpaint_mask; pass the mask to blur")
        return
    if values["input_image"] is None:
        raise ValueError("inpaint_mask is given without input_image; pass the image to inpaint")
    if values["resize_mode"] == "stretch":
        return
    pairs = zip(image_list(values["input_image"]), cycle(image_list(mask)), strict=False)
    for image, one in pairs:
        if isinstance(image, Image.Image) and not 0.98 < _aspect(image) / _aspect(one) < 1.02:
            logger.warning(
                "input_image is %dx%d and inpaint_mask %dx%d: with resize_mode=%r the mask lies elsewhere on the image "
                "than where it was drawn",
                *(*image.size, *one.size, values["resize_mode"]),
            )


def _aspect(image: Image.Image) -> float:
    width, height = image.size
    return height / width if image.getexif().get(_ORIENTATION, 1) >= _FIRST_TURNED else width / height


INPAINT = Feature(
    "inpaint",
    arguments=InpaintArguments,
    units=(prepare_inpainting,),
    conditions={"inpainting": Condition("an image has no frames", batch="separate", constrain=toward_input)},
    check=check,
)
"""The feature that keeps what is outside of a mask as it is in the input image."""


def _mask(mask: Image.Image, height: int, width: int, resize_mode: ResizeMode) -> Float[Tensor, "1 1 height width"]:
    """Return an fp32 tensor `1 1 height width` of a mask's brightness in [0, 1]."""
    levels = np.array(fit(to_mask(mask), height, width, resize_mode=resize_mode), dtype=np.float32)
    return torch.from_numpy(levels)[None, None] / 255
