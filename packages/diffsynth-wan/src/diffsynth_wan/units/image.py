"""First and last image of the video: as condition latents, as clean latents, and as hidden states of CLIP."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.unit import unit
from diffsynth_wan.units.shape import VideoShape

CLIP_TOKENS = 257
"""Number of hidden states of one image."""


@unit("image_latents")
def encode_image_latents(
    vae: Any,
    *,
    input_image: Image.Image | None = None,
    end_image: Image.Image | None = None,
    animate_latents: Float[Tensor, "1 c_image t h w"] | None = None,
    video_shape: VideoShape,
    in_channels: int,
    latent_channels: int,
    frame_times: bool,
) -> Float[Tensor, "1 c_image t h w"] | None:
    """Return a tensor `1 c_image t h w`: channels of a mask, then latents of a clip from `input_image` over grey frames
    to `end_image`, if given; if `in_channels` is twice `latent_channels`, latents of `input_image` and zero frames
    without a mask. None without an image or if `frame_times`; `animate_latents`, if given, are returned instead.

    Networks with as many image channels as latent channels (Control-Camera of Wan 2.1) were trained with the latents
    of the first frame, zeros for later frames, and no mask. Animate has its own latents.
    """
    if animate_latents is not None:
        return animate_latents
    if input_image is None or frame_times:
        return None
    if in_channels == 2 * latent_channels:
        encoded = video_shape.encode_image(vae, input_image)
        frames = video_shape.latent_size[0]
        return torch.cat([encoded, encoded.new_zeros(1, latent_channels, frames - 1, *encoded.shape[3:])], dim=2)
    first = video_shape.pixels(input_image)
    last = None if end_image is None else video_shape.pixels(end_image)
    pieces = video_shape.keyframe_pieces(first, last)
    encoded = video_shape.encode_pieces(vae, pieces, num_frames=video_shape.num_frames)
    shape = (1, video_shape.time_factor, *video_shape.latent_size)
    # The frames of a latent frame are channels of the mask; the first frame fills all of them.
    mask = torch.zeros(shape, device=video_shape.device, dtype=video_shape.dtype)
    mask[:, :, 0] = 1
    if last is not None:
        mask[:, -1, -1] = 1
    return torch.cat([mask, encoded], dim=1)


@unit("first_latents")
def encode_first_frame(
    vae: Any, *, input_image: Image.Image | None = None, video_shape: VideoShape, frame_times: bool
) -> Float[Tensor, "1 c 1 h w"] | None:
    """Return the latents `1 c 1 h w` of `input_image`, for networks with one noise level per frame; None for other
    networks or without an image.
    """
    if input_image is None or not frame_times:
        return None
    return video_shape.encode_image(vae, input_image)


@unit("image_embeds")
def encode_image_embeds(
    image_encoder: Any = None,
    *,
    input_image: Image.Image | None = None,
    end_image: Image.Image | None = None,
    reference_image: Image.Image | None = None,
    animate2_reference_image: Image.Image | None = None,
    video_shape: VideoShape,
    image_dim: int,
    image_tokens: int,
) -> Float[Tensor, "1 s e"] | None:
    """Return CLIP's hidden states `1 s e` of the reference image (of Wan-Fun or Animate-2) if given, else of the first
    image and, if `image_tokens` is not 0, the last one; zeros without an image, None if `image_dim` is 0.

    They are those of the reference image or the character's image if there is one; else of the first image and, in a
    network with positions for two images, the last one.
    """
    if not image_dim:
        return None
    if reference_image is not None or animate2_reference_image is not None:
        images = [reference_image or animate2_reference_image]
    else:
        images = [image for image in (input_image, end_image if image_tokens else None) if image is not None]
    device, dtype = video_shape.device, video_shape.dtype
    if not images:
        return torch.zeros(1, image_tokens or CLIP_TOKENS, image_dim, device=device, dtype=dtype)
    embeds = [image_encoder(video_shape.pixels(image).to(device, dtype)) for image in images]
    return torch.cat(embeds, dim=1)


@unit("condition_latents")
def concat_condition_latents(
    *,
    image_latents: Float[Tensor, "1 c_image t h w"] | None = None,
    control_latents: Float[Tensor, "1 c t h w"] | None = None,
    video_shape: VideoShape,
    in_channels: int,
    latent_channels: int,
) -> Float[Tensor, "1 c_condition t h w"] | None:
    """Return a tensor `1 c_condition t h w` of `in_channels - latent_channels` channels: control video, if the network
    takes one, then mask and image of `image_latents`, zeros if that is None; None for 0 channels.

    In a network with channels for a control video, those of a missing image are zero.
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
        shape = (1, channels, *video_shape.latent_size)
        parts.append(torch.zeros(shape, device=video_shape.device, dtype=video_shape.dtype))
    return torch.cat(parts, dim=1)
