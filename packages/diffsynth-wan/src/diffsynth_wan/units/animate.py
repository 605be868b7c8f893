"""Wan-Animate: a character moves like the people of a clip, or takes the place of one of them (arXiv:2509.14055)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.unit import unit
from diffsynth_wan.extension import Extension
from diffsynth_wan.units.canvas import Canvas
from diffsynth_wan.units.clips import Clip, clip_pieces
from diffsynth_wan.variants.animate import AnimateMotion


@unit("steers_towards", "steers_away")
def tell_branches() -> tuple[bool, bool]:
    """What the two branches of guidance are for, as `steers_towards` of each says."""
    return True, False


@unit("animate_latents", requires=("animate_adapter",))
def encode_character(
    vae: Any,
    *,
    input_image: Image.Image | None = None,
    animate_pose_video: Clip | None = None,
    animate_inpaint_video: Clip | None = None,
    animate_mask_video: Clip | None = None,
    canvas: Canvas,
) -> Float[Tensor, "1 c_image t h w"] | None:
    """Mask and latents of the character's image, in front of those of the scene: grey, or a clip that keeps what the
    mask leaves black.
    """
    if animate_pose_video is None:
        return None
    assert input_image is not None, "checked before anything was encoded"
    image = canvas.encode_pieces(vae, [canvas.pixels(input_image)[:, :, None]], num_frames=1)
    frames = canvas.num_frames - canvas.time_factor
    if animate_inpaint_video is None:
        grey = torch.zeros(1, 3, canvas.height, canvas.width)
        still = canvas.still_pieces(grey)
        scene = canvas.encode_pieces(vae, (next(still) for _ in range(canvas.latent_size[0] - 1)), num_frames=frames)
        kept = scene.new_zeros(1, canvas.time_factor, *scene.shape[2:])
    else:
        scene = canvas.encode_clip(vae, "animate_inpaint_video", animate_inpaint_video, num_frames=frames)
        kept = _kept(animate_mask_video, canvas, frames)
    image = torch.cat([image.new_ones(1, canvas.time_factor, 1, *image.shape[3:]), image], dim=1)
    return torch.cat([image, torch.cat([kept.to(scene), scene], dim=1)], dim=2)


def _kept(mask: Clip | None, canvas: Canvas, frames: int) -> Float[Tensor, "1 time_factor t h w"]:
    """1 where the scene stays; the frames of a latent frame are channels, and the first stands for all of its own."""
    assert mask is not None, "checked before anything was encoded"
    size = {"num_frames": frames, "height": canvas.height, "width": canvas.width}
    pieces = clip_pieces("animate_mask_video", mask, piece=canvas.time_factor, **size)
    small = [
        F.interpolate(piece[0, :1].transpose(0, 1), size=canvas.latent_size[1:], mode="nearest") for piece in pieces
    ]
    kept = 1 - (torch.cat(small)[:, 0] + 1) / 2
    kept = torch.cat([kept[:1].expand(canvas.time_factor - 1, -1, -1), kept])
    return kept.unflatten(0, (-1, canvas.time_factor)).transpose(0, 1)[None]


@unit("extensions", branches={"uncond": {"steers_towards": "steers_away"}})
def move_character(
    animate_adapter: Any,
    vae: Any,
    *,
    extensions: tuple[Extension, ...],
    animate_pose_video: Clip | None = None,
    animate_face_video: Clip | None = None,
    steers_towards: bool,
    canvas: Canvas,
) -> tuple[Extension, ...]:
    """Pose and face of the character; guidance steers away from a black face."""
    if animate_pose_video is None:
        return extensions
    frames = canvas.num_frames - canvas.time_factor
    pose = canvas.encode_clip(vae, "animate_pose_video", animate_pose_video, num_frames=frames)
    side = animate_adapter.config.face_size
    face = torch.full((1, 3, frames, side, side), -1.0)
    if steers_towards:
        assert animate_face_video is not None, "checked before anything was encoded"
        size = {"num_frames": frames, "height": side, "width": side}
        pieces = clip_pieces("animate_face_video", animate_face_video, piece=canvas.time_factor, **size)
        face = torch.cat(list(pieces), dim=2)
    return (*extensions, AnimateMotion(animate_adapter, *animate_adapter(pose, face.to(canvas.device, canvas.dtype))))


@unit("lead_frames", requires=("animate_adapter",))
def lead_with_character(*, lead_frames: int, animate_pose_video: Clip | None = None) -> int:
    """The first latent frame is the character's image; the video is what comes behind it, four frames shorter."""
    return lead_frames + (animate_pose_video is not None)
