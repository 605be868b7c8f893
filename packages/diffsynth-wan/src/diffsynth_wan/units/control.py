"""Control video and reference image of Wan-Fun, and speed control."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.unit import unit
from diffsynth_wan.extension import Extension
from diffsynth_wan.units.clips import Clip
from diffsynth_wan.units.shape import VideoShape
from diffsynth_wan.variants.reference import ReferenceFrame
from diffsynth_wan.variants.speed import SpeedControl


@unit("control_latents")
def encode_control_video(
    vae: Any, *, control_video: Clip | None = None, video_shape: VideoShape
) -> Float[Tensor, "1 c t h w"] | None:
    """Return the latents `1 c t h w` of the first frames of the control video, as many as the call's video has; None
    without a control video.
    """
    return None if control_video is None else video_shape.encode_clip(vae, "control_video", control_video)


@unit("extensions")
def add_reference_image(
    vae: Any, *, extensions: tuple[Extension, ...], reference_image: Image.Image | None = None, video_shape: VideoShape
) -> tuple[Extension, ...]:
    """Return the tuple `extensions` with a `ReferenceFrame` (encoded image) appended; unchanged without a reference
    image.
    """
    if reference_image is None:
        return extensions
    return (*extensions, ReferenceFrame(video_shape.encode_image(vae, reference_image)[:, :, 0]))


@unit("extensions")
def add_speed_control(
    motion_controller: Any,
    *,
    extensions: tuple[Extension, ...],
    motion_bucket_id: float | None = None,
    video_shape: VideoShape,
) -> tuple[Extension, ...]:
    """Return the tuple `extensions` with a `SpeedControl` appended; unchanged if `motion_bucket_id` is None."""
    if motion_bucket_id is None:
        return extensions
    bucket = torch.tensor([float(motion_bucket_id)], device=video_shape.device)
    return (*extensions, SpeedControl(motion_controller(bucket)))
