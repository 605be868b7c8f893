"""Images that a video begins or ends with: beside the latents, in them, and as the image encoder sees them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.unit import unit
from diffsynth_wan.units.canvas import Canvas

CLIP_TOKENS = 257
"""Hidden states of one image."""


@unit("image_latents")
def encode_images(
    vae: Any,
    *,
    input_image: Image.Image | None = None,
    end_image: Image.Image | None = None,
    animate_latents: Float[Tensor, "1 c_image t h w"] | None = None,
    canvas: Canvas,
    in_channels: int,
    latent_channels: int,
    frame_times: bool,
) -> Float[Tensor, "1 c_image t h w"] | None:
    """A mask of the frames that are given, and the latents of a clip that shows them and is grey between.

    Networks with as many image channels as latents (Control-Camera of Wan 2.1) were trained on the latents of the
    first frame alone, and zeros behind it. Animate has its own.
    """
    if animate_latents is not None:
        return animate_latents
    if input_image is None or frame_times:
        return None
    first = canvas.pixels(input_image)
    if in_channels == 2 * latent_channels:
        encoded = canvas.encode_pieces(vae, [first[:, :, None]], num_frames=1)
        frames = canvas.latent_size[0]
        return torch.cat([encoded, encoded.new_zeros(1, latent_channels, frames - 1, *encoded.shape[3:])], dim=2)
    last = None if end_image is None else canvas.pixels(end_image)
    encoded = canvas.encode_pieces(vae, canvas.still_pieces(first, last), num_frames=canvas.num_frames)
    return torch.cat([given_frames(canvas, first=True, last=last is not None), encoded], dim=1)


def given_frames(canvas: Canvas, *, first: bool, last: bool) -> Float[Tensor, "1 time_factor t h w"]:
    """1 where a frame is given; the frames of a latent frame are channels, and the first stands for `time_factor`."""
    mask = torch.zeros(1, canvas.time_factor, *canvas.latent_size, device=canvas.device, dtype=canvas.dtype)
    mask[:, :, 0] = float(first)
    if last:
        mask[:, -1, -1] = 1
    return mask


@unit("first_latents")
def encode_first_frame(
    vae: Any, *, input_image: Image.Image | None = None, canvas: Canvas, frame_times: bool
) -> Float[Tensor, "1 c 1 h w"] | None:
    """The latent frame that the video begins with, for networks with a noise level for each frame (TI2V)."""
    if input_image is None or not frame_times:
        return None
    return canvas.encode_pieces(vae, [canvas.pixels(input_image)[:, :, None]], num_frames=1)


@unit("image_embeds")
def encode_with_clip(
    image_encoder: Any = None,
    *,
    input_image: Image.Image | None = None,
    end_image: Image.Image | None = None,
    reference_image: Image.Image | None = None,
    animate2_reference_image: Image.Image | None = None,
    canvas: Canvas,
    image_dim: int,
    image_tokens: int,
) -> Float[Tensor, "1 s e"] | None:
    """What the image encoder sees, for networks that read it: of the reference image or the character if there is one,
    else of the first image, and of the last where there are positions for two; zeros without any.
    """
    if not image_dim:
        return None
    if reference_image is not None or animate2_reference_image is not None:
        images = [reference_image or animate2_reference_image]
    else:
        images = [image for image in (input_image, end_image if image_tokens else None) if image is not None]
    if not images:
        return torch.zeros(1, image_tokens or CLIP_TOKENS, image_dim, device=canvas.device, dtype=canvas.dtype)
    seen = [image_encoder(canvas.pixels(image).to(canvas.device, canvas.dtype)) for image in images]
    return torch.cat(seen, dim=1)


@unit("condition_latents")
def join_conditions(
    *,
    image_latents: Float[Tensor, "1 c_image t h w"] | None = None,
    control_latents: Float[Tensor, "1 c t h w"] | None = None,
    canvas: Canvas,
    in_channels: int,
    latent_channels: int,
) -> Float[Tensor, "1 c_condition t h w"] | None:
    """What stands beside the latents, in as many channels as the network has: control, mask, image.

    A network with channels for a control video gets zeros where the image is missing.
    """
    channels = in_channels - latent_channels
    if not channels:
        return None
    parts = []
    if channels >= 2 * latent_channels:
        assert control_latents is not None, "checked before anything was encoded"
        parts.append(control_latents)
        channels -= latent_channels
    if image_latents is not None:
        parts.append(image_latents[:, -channels:])
    else:
        parts.append(torch.zeros(1, channels, *canvas.latent_size, device=canvas.device, dtype=canvas.dtype))
    return torch.cat(parts, dim=1)
