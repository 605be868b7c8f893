"""How large the video is; and where the lists of what joins the network begin."""

from __future__ import annotations

import logging

import torch

from diffsynth.models.video_tiles import cover
from diffsynth.runtime.unit import unit
from diffsynth_wan.extension import Extension
from diffsynth_wan.units.canvas import PATCH, Canvas, rounded_shape

logger = logging.getLogger(__name__)


@unit("height", "width", "num_frames")
def round_shape(
    *, height: int = 480, width: int = 832, num_frames: int = 81, vae_factor: int, time_factor: int
) -> tuple[int, int, int]:
    """Sides rounded up to whole tokens, frames to one more than a multiple of 4; logged if they change."""
    rounded = rounded_shape(height, width, num_frames, vae_factor=vae_factor, time_factor=time_factor)
    if rounded[:2] != (height, width):
        logger.warning("%dx%d is rounded up to %dx%d, multiples of %d", height, width, *rounded[:2], PATCH * vae_factor)
    if rounded[2] != num_frames:
        logger.warning("%d frames are rounded up to %d, %d k + 1", num_frames, rounded[2], time_factor)
    return rounded


@unit("canvas", "extensions", "lead_frames")
def stretch_canvas(
    *,
    height: int,
    width: int,
    num_frames: int,
    tiled: bool = True,
    tile_size: tuple[int, int] = (30, 52),
    tile_stride: tuple[int, int] = (15, 26),
    vae_factor: int,
    time_factor: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Canvas, tuple[Extension, ...], int]:
    """What the other units draw on; no extension of the network yet, and no latent frame in front of the video.

    Raises:
        ValueError: tiles of no size, or that leave gaps.
    """
    canvas = Canvas(
        num_frames=num_frames,
        height=height,
        width=width,
        vae_factor=vae_factor,
        time_factor=time_factor,
        tiling={"tiled": tiled, "tile_size": tuple(tile_size), "tile_stride": tuple(tile_stride)},
        device=device,
        dtype=dtype,
    )
    cover(*canvas.latent_size[1:], **canvas.tiling)  # tells now what the autoencoder would tell much later
    return canvas, (), 0
