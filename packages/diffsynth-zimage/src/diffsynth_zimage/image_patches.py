"""Patches that the image encoder of Z-Image-Omni-Base reads."""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_rgb
from diffsynth_zimage.config import Siglip2ImageEncoderConfig

_LARGEST_SCALE, _SCALE_STEP = 100.0, 1e-5
"""Largest factor of an image's sides, and the precision to which it is found; both are the published processor's."""


def siglip2_patches(image: Image.Image, config: Siglip2ImageEncoderConfig) -> Float[Tensor, "1 rows columns values"]:
    """Return an image as an fp32 tensor `1 rows columns values` in [-1, 1]: the pixels of each patch, row by row with
    channels last, of the image resized to the grid of `siglip2_grid`.
    """
    rows, columns = siglip2_grid(image.height, image.width, config)
    size = (columns * config.patch_size, rows * config.patch_size)
    pixels = torch.from_numpy(np.array(to_rgb(image).resize(size, Image.Resampling.BILINEAR), dtype=np.float32))
    return rearrange(pixels / 127.5 - 1.0, "(h p) (w q) c -> 1 h w (p q c)", p=config.patch_size, q=config.patch_size)


def siglip2_grid(height: int, width: int, config: Siglip2ImageEncoderConfig) -> tuple[int, int]:
    """Return (rows, columns) of patches for an image of height x width pixels: those of the largest scale, up to 100,
    at which they are at most `config.max_patches`. Both sides are rounded up to whole patches.
    """

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(math.ceil(side * scale / config.patch_size), 1) for side in (height, width))
        return rows, columns

    low, high = _SCALE_STEP / 10, _LARGEST_SCALE
    while high - low >= _SCALE_STEP:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(grid(middle)) <= config.max_patches else (low, middle)
    return grid(low)
