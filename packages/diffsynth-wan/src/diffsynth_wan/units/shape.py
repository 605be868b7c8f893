"""How large the video is; and where the lists of what joins the network begin."""

from __future__ import annotations

import logging

import torch

from diffsynth.models.tiles import cover
from diffsynth.runtime.unit import unit
from diffsynth_wan.extension import Extension
from diffsynth_wan.units.canvas import PATCH, Canvas, rounded_shape
from diffsynth_wan.windows import SlidingWindow

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


@unit("sliding_window")
def slide_window(
    *, sliding_window_size: int | None = None, sliding_window_stride: int | None = None, lead_frames: int
) -> SlidingWindow | None:
    """How a long video is cut, None to draw it whole; behind all units that put frames in front."""
    return asked_window(sliding_window_size, sliding_window_stride, lead=lead_frames)


def asked_window(size: int | None, stride: int | None, *, lead: int = 0) -> SlidingWindow | None:
    """The windows that the two arguments ask for.

    Raises:
        ValueError: one without the other, no positive integer, or a stride that leaves gaps.
    """
    if size is None and stride is None:
        return None
    for name, value in (("sliding_window_size", size), ("sliding_window_stride", stride)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a positive number of latent frames; give both, or neither")
    assert size is not None
    assert stride is not None
    if stride > size:
        raise ValueError(f"sliding_window_stride={stride} is larger than sliding_window_size={size} and leaves gaps")
    return SlidingWindow(size, stride, lead)
