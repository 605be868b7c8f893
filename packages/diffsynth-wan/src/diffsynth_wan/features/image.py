"""First and last image of the video: as condition latents, as clean latents, and as hidden states of CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.errors import MissingComponent
from diffsynth.runtime.feature import Condition, Configs, Feature, frames, whole
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_wan.units.shape import VideoShape

CLIP_TOKENS = 257
"""Number of hidden states of one image."""


class ImageArguments(TypedDict, total=False):
    """First and last frame.

    Args:
        input_image: First frame of the video, for image-to-video models; the character's image for Animate.
        end_image: Last frame of the video, for models that take one; None leaves it free.
    """

    input_image: Image.Image | None
    end_image: Image.Image | None


@unit("image_latents", phase=Phase.ENCODE)
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


@unit("first_latents", "kept_latents", phase=Phase.ENCODE)
def encode_first_frame(
    vae: Any, *, input_image: Image.Image | None = None, video_shape: VideoShape, frame_times: bool
) -> tuple[Float[Tensor, "1 c 1 h w"] | None, Float[Tensor, "1 c 1 h w"] | None]:
    """Return the latents `1 c 1 h w` of `input_image`, for networks with one noise level per frame, twice: for the
    network, and for the frame that guidance and solver keep; None for other networks or without an image.
    """
    if input_image is None or not frame_times:
        return None, None
    latents = video_shape.encode_image(vae, input_image)
    return latents, latents


def keep_first_frames(
    velocity: Float[Tensor, "b c t h w"],
    latents: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b"],
    kept_latents: Float[Tensor, "#b c t_first h w"],
) -> Float[Tensor, "b c t h w"]:
    """Return the velocity; in the first frames it leads to `kept_latents` in a straight line, also from the noise that
    a solver such as Euler ancestral adds. It is 0 where the latents are these.

    Args:
        velocity: guided, `noise - x0`.
        latents: at the noise level.
        sigma: noise levels, fp32, above 0.
        kept_latents: clean latents of the first frames.
    """
    given = kept_latents.shape[2]
    first = (latents[:, :, :given].float() - kept_latents.float()) / sigma[:, None, None, None, None]
    return torch.cat([first.to(velocity.dtype), velocity[:, :, given:]], dim=2)


@unit("image_embeds", phase=Phase.ENCODE)
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


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for images that the network does not take, or that are missing.

    Raises:
        ValueError: an end image without an input image, an input that the network does not take, or a missing one.
        MissingComponent: the image encoder is not loaded.
    """
    first, last, config = values["input_image"], values["end_image"], configs["dit"]
    if last is not None and first is None:
        raise ValueError("end_image without input_image; pass the first image of the video, too")
    if last is not None and values["num_frames"] < 2:
        raise ValueError(f"end_image with num_frames={values['num_frames']}: expected at least 2 frames")
    if config is None:
        return
    channels = config.in_channels - config.out_channels
    takes_image = (channels > 0 or config.frame_times or config.image_dim > 0) and not config.reference_video
    takes_control = channels >= 2 * config.out_channels
    # A network of Animate-2 takes other images; the pipeline refuses these two together.
    if first is not None and not takes_image and values["animate2_reference_video"] is None:
        raise ValueError("input_image is given, but this network takes none; load an image-to-video model")
    if first is None and takes_image and channels > 0 and not takes_control:
        raise ValueError("this network needs an image to begin with; pass input_image")
    if last is not None and (config.frame_times or channels == config.out_channels):
        raise ValueError("end_image is given, but this network takes a first image only")
    if last is None and config.image_tokens:
        raise ValueError("this network needs a first and a last image; pass end_image, too")
    images = (first, last, values["reference_image"], values["animate2_reference_image"])
    if config.image_dim and configs["image_encoder"] is None and any(image is not None for image in images):
        raise MissingComponent("this network needs image_encoder for images; add the CLIP file to model_configs")


IMAGE = Feature(
    "image",
    arguments=ImageArguments,
    roles={"image_encoder": Role(architectures=("wan_image_encoder",), optional=True)},
    facts={"image_dim": "dit.image_dim", "image_tokens": "dit.image_tokens", "frame_times": "dit.frame_times"},
    agreements=(Agreement("width of the image", ("image_encoder.dim", "dit.image_dim", "dit2.image_dim"), none=0),),
    units=(encode_image_latents, encode_first_frame, encode_image_embeds, concat_condition_latents),
    conditions={
        "image_embeds": Condition(whole),
        "condition_latents": Condition(frames()),
        "first_latents": Condition(frames()),
        "kept_latents": Condition(whole, constrain=keep_first_frames),
    },
    check=check,
)
