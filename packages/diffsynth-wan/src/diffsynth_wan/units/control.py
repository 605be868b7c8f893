"""Wan-Fun: a control video beside the latents, a reference image in front, a camera that moves; and speed control."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.unit import unit
from diffsynth_wan.extension import Extension
from diffsynth_wan.units.camera_path import ORIGIN, camera_rays
from diffsynth_wan.units.canvas import Canvas
from diffsynth_wan.units.clips import Clip
from diffsynth_wan.variants.camera import CameraMotion
from diffsynth_wan.variants.reference import ReferenceFrame
from diffsynth_wan.variants.speed import Speed

Direction = Literal["Left", "Right", "Up", "Down", "LeftUp", "LeftDown", "RightUp", "RightDown"]


@unit("control_latents")
def encode_control(vae: Any, *, control_video: Clip | None = None, canvas: Canvas) -> Float[Tensor, "1 c t h w"] | None:
    """Latents of the control video; None without one."""
    return None if control_video is None else canvas.encode_clip(vae, "control_video", control_video)


@unit("extensions")
def place_reference(
    vae: Any, *, extensions: tuple[Extension, ...], reference_image: Image.Image | None = None, canvas: Canvas
) -> tuple[Extension, ...]:
    """The reference image, encoded, as one more frame in front."""
    if reference_image is None:
        return extensions
    latents = canvas.encode_pieces(vae, [canvas.pixels(reference_image)[:, :, None]], num_frames=1)
    return (*extensions, ReferenceFrame(latents[:, :, 0]))


@unit("extensions")
def move_camera(
    *,
    extensions: tuple[Extension, ...],
    camera_control_direction: Direction | None = None,
    camera_control_speed: float = 1 / 54,
    camera_control_origin: tuple[float, ...] = ORIGIN,
    canvas: Canvas,
) -> tuple[Extension, ...]:
    """The rays of a camera that moves this way; without a direction the network runs without its adapter."""
    if camera_control_direction is None:
        return extensions
    rays = camera_rays(
        camera_control_direction,
        num_frames=canvas.num_frames,
        height=canvas.height,
        width=canvas.width,
        speed=camera_control_speed,
        origin=camera_control_origin,
    )
    # The first frame stands for four, like in the latents; the frames of a latent frame become channels.
    frames = torch.cat([rays[:, :1].expand(-1, canvas.time_factor - 1, -1, -1), rays], dim=1)
    folded = frames.unflatten(1, (-1, canvas.time_factor)).transpose(1, 2).flatten(0, 1)
    return (*extensions, CameraMotion(folded[None].to(canvas.device, canvas.dtype)))


@unit("extensions")
def control_speed(
    motion_controller: Any,
    *,
    extensions: tuple[Extension, ...],
    motion_bucket_id: float | None = None,
    canvas: Canvas,
) -> tuple[Extension, ...]:
    """How much moves, from 0 to 100; None leaves it to the network."""
    if motion_bucket_id is None:
        return extensions
    bucket = torch.tensor([float(motion_bucket_id)], device=canvas.device)
    return (*extensions, Speed(motion_controller(bucket)))
