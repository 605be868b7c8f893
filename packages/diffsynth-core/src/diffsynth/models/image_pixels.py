"""Pixels that image encoders read: images resized and normalised as in the training of these networks."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_rgb

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels of ImageNet's images."""


def siglip_pixels(
    image: Image.Image, size: int, *, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Float[Tensor, "1 3 side side"]:
    """Return an image as an fp32 tensor `1 3 size size` in [-1, 1], resized without keeping its aspect ratio.

    Args:
        image: the image.
        size: side in pixels.
        resample: the filter: bicubic for SigLIP, bilinear for SigLIP 2.

    Raises:
        ValueError: an image that cannot be converted, see `diffsynth.core.data.color.to_rgb`.
    """
    resized = to_rgb(image).resize((size, size), resample)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32))
    return rearrange(pixels / 127.5 - 1.0, "h w c -> 1 c h w")


def dinov3_pixels(image: Image.Image, size: int) -> Float[Tensor, "1 3 side side"]:
    """Return an image as an fp32 tensor `1 3 size size` with the mean and deviation of ImageNet, resized without
    keeping its aspect ratio: bilinearly, with antialiasing, on unrounded levels.

    Raises:
        ValueError: an image that cannot be converted, see `diffsynth.core.data.color.to_rgb`.
    """
    levels = rearrange(torch.from_numpy(np.array(to_rgb(image), dtype=np.float32)), "h w c -> 1 c h w") / 255
    levels = F.interpolate(levels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (levels - mean) / std
