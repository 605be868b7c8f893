"""Wan-Animate: a character takes pose and face from videos, in a new scene or in a given one (arXiv:2509.14055)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.feature import Condition, Configs, Feature, in_window
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_wan.units.clips import Clip, check_clip, check_mask_clip
from diffsynth_wan.units.shape import VideoShape
from diffsynth_wan.units.size import video_size
from diffsynth_wan.variants.animate import AnimateMotion

CLIPS = ("animate_pose_video", "animate_face_video", "animate_inpaint_video", "animate_mask_video")


class AnimateArguments(TypedDict, total=False):
    """Inputs of Animate, with the character's image as `input_image`.

    The videos need at least `num_frames - 4` frames, which is the number of frames of the result.

    Args:
        animate_pose_video: Pose video that the character follows.
        animate_face_video: Face video that the character's expression follows.
        animate_inpaint_video: Scene that the character is placed in; None generates the scene.
        animate_mask_video: Video that is white where the scene changes, with as many frames as `animate_inpaint_video`.
    """

    animate_pose_video: Clip | None
    animate_face_video: Clip | None
    animate_inpaint_video: Clip | None
    animate_mask_video: Clip | None


@unit("animate_latents", requires=("animate_adapter",), phase=Phase.ENCODE)
def encode_animate_latents(
    vae: Any,
    *,
    input_image: Image.Image | None = None,
    animate_pose_video: Clip | None = None,
    animate_inpaint_video: Clip | None = None,
    animate_mask_video: Clip | None = None,
    video_shape: VideoShape,
) -> Float[Tensor, "1 c_image t h w"] | None:
    """Return a tensor `1 c_image t h w`, channels of a mask and of latents: one frame of the character's image, then
    those of the scene; None without a pose video.

    The scene is grey, or the inpaint video, which is kept where its mask is black.
    """
    if animate_pose_video is None:
        return None
    assert input_image is not None, "checked before anything was encoded"
    image = video_shape.encode_image(vae, input_image)
    time_factor = video_shape.time_factor
    frames = video_shape.num_frames - time_factor
    if animate_inpaint_video is None:
        grey = video_shape.keyframe_pieces(torch.zeros(1, 3, video_shape.height, video_shape.width))
        pieces = (next(grey) for _ in range(video_shape.latent_size[0] - 1))
        scene = video_shape.encode_pieces(vae, pieces, num_frames=frames)
        kept = scene.new_zeros(1, time_factor, *scene.shape[2:])
    else:
        scene = video_shape.encode_clip(vae, "animate_inpaint_video", animate_inpaint_video, num_frames=frames)
        kept = _kept_mask(animate_mask_video, video_shape, frames)
    image = torch.cat([image.new_ones(1, time_factor, 1, *image.shape[3:]), image], dim=1)
    return torch.cat([image, torch.cat([kept.to(scene), scene], dim=1)], dim=2)


def _kept_mask(mask: Clip | None, shape: VideoShape, frames: int) -> Float[Tensor, "1 time_factor t h w"]:
    """Return a mask `1 time_factor t h w` in [0, 1], 1 where the scene is kept; its channels are the video frames of a
    latent frame.

    The first frame fills all channels of its latent frame.
    """
    assert mask is not None, "checked before anything was encoded"
    pieces = shape.clip_pieces("animate_mask_video", mask, num_frames=frames, is_mask=True)
    small = [
        F.interpolate(piece[0, :1].transpose(0, 1), size=shape.latent_size[1:], mode="nearest") for piece in pieces
    ]
    kept = 1 - (torch.cat(small)[:, 0] + 1) / 2
    kept = torch.cat([kept[:1].expand(shape.time_factor - 1, -1, -1), kept])
    return kept.unflatten(0, (-1, shape.time_factor)).transpose(0, 1)[None]


@unit("animate_motion", branches={"uncond": {"is_cond": "is_cond_of_uncond"}})
def encode_animate_motion(
    animate_adapter: Any,
    vae: Any,
    *,
    animate_pose_video: Clip | None = None,
    animate_face_video: Clip | None = None,
    is_cond: bool,
    video_shape: VideoShape,
) -> AnimateMotion | None:
    """Return an `AnimateMotion` of pose and face; None without a pose video.

    The unconditional branch gets a black face.
    """
    if animate_pose_video is None:
        return None
    frames = video_shape.num_frames - video_shape.time_factor
    pose = video_shape.encode_clip(vae, "animate_pose_video", animate_pose_video, num_frames=frames)
    side = animate_adapter.config.face_size
    face = torch.full((1, 3, frames, side, side), -1.0)
    if is_cond:
        assert animate_face_video is not None, "checked before anything was encoded"
        faces = replace(video_shape, height=side, width=side)
        pieces = faces.clip_pieces("animate_face_video", animate_face_video, num_frames=frames)
        face = torch.cat(list(pieces), dim=2)
    motion = animate_adapter(pose, face.to(video_shape.device, video_shape.dtype))
    return AnimateMotion(animate_adapter, *motion)


@unit("prefix_frames", requires=("animate_adapter",), phase=Phase.LATENTS)
def add_animate_prefix_frame(*, prefix_frames: int, animate_pose_video: Clip | None = None) -> int:
    """Return the number of prefix frames: `prefix_frames`, plus one for the character's image if there is a pose video.

    It is the first latent frame of `num_frames`, so the unit runs after the noise is generated.
    """
    return prefix_frames + (animate_pose_video is not None)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for videos of Animate that do not fit the call's video or each other, or that are missing.

    Raises:
        ValueError: a video is missing, too short, of another size or of another length than its mask.
    """
    size = video_size(configs, values)
    pose, face, scene, mask = (values[name] is not None for name in CLIPS)
    if pose and size["num_frames"] < 5:
        raise ValueError(
            f"num_frames={size['num_frames']}: expected at least 5; Animate uses 4 frames for the character's image"
        )
    for name in CLIPS:
        if values[name] is not None:
            frames = {"num_frames": size["num_frames"] - 4}
            check_clip(name, values[name], **size | frames, any_size=name == "animate_face_video")
    if configs["animate_adapter"] is None:
        return  # arguments whose component is not loaded were refused before
    if not pose or not face:
        missing = " and ".join(name for name, there in zip(CLIPS, (pose, face), strict=False) if not there)
        raise ValueError(f"this model needs a pose video and a face video; pass {missing}")
    if scene != mask:
        raise ValueError("only one of animate_inpaint_video and animate_mask_video is given; pass both or neither")
    if scene:
        check_mask_clip("animate_mask_video", "animate_inpaint_video", values)


ANIMATE = Feature(
    "animate",
    arguments=AnimateArguments,
    roles={"animate_adapter": Role(architectures=("wan_animate_adapter",), optional=True)},
    loop_roles=("animate_adapter",),
    agreements=(
        Agreement("width of the tokens", ("dit.dim", "animate_adapter.dim")),
        Agreement("number of latent channels", ("dit.out_channels", "animate_adapter.latent_channels")),
    ),
    units=(encode_animate_latents, encode_animate_motion, add_animate_prefix_frame),
    conditions={"animate_motion": Condition(in_window, batch="separate")},
    check=check,
)
