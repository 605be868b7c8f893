"""Camera control of Wan-Fun: the rays of a rotating camera, as in training (CameraCtrl, arXiv:2404.02101).

The embedded ray of every pixel is added to the tokens before the blocks. The network's adapter is part of the
transformer's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypedDict, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffsynth.errors import did_you_mean
from diffsynth.runtime.feature import Condition, Configs, Feature, in_window
from diffsynth.runtime.unit import unit
from diffsynth.sampling.windows import Window
from diffsynth_wan.extension import Network, Stream, TokenScope
from diffsynth_wan.units.shape import VideoShape

ORIGIN = (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
"""First camera, a line of a RealEstate10K camera file.

Time; focal lengths and principal point as fractions of width and height; two zeros; the rows of the 3 x 4 matrix from
world to camera.
"""

Direction = Literal["Left", "Right", "Up", "Down", "LeftUp", "LeftDown", "RightUp", "RightDown"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)

_STEPS = {"Left": (0, 1.0), "Right": (0, -1.0), "Up": (1, 1.0), "Down": (1, -1.0)}
"""Row of the matrix whose third entry changes from frame to frame, and the sign of the change."""

_SCREEN = 1280 / 720
"""Aspect ratio (width / height) of the images that the focal lengths refer to."""


class CameraArguments(TypedDict, total=False):
    """Camera path.

    Args:
        camera_control_direction: Direction in which the camera turns, for Control-Camera models; None disables camera
            control.
        camera_control_speed: Change of the camera's matrix from frame to frame.
        camera_control_origin: First camera, 19 numbers; see `diffsynth_wan.features.camera.ORIGIN`.
    """

    camera_control_direction: Direction | None
    camera_control_speed: float
    camera_control_origin: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class CameraMotion:
    """Extension that conditions the video on a camera path.

    Args:
        rays: Plücker coordinates of the ray through each pixel, 6 per frame. Those of the 4 frames of a latent frame
            are stacked along the channels: 24 channels at the resolution of the video.
    """

    rays: Float[Tensor, "b 24 t height width"]
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the embedded rays added to its tokens; see `Extension`.

        Raises:
            ValueError: the network has no camera adapter.
        """
        if not dit.config.camera_channels:
            raise ValueError("this network has no camera adapter (control_adapter); use a Control-Camera model")
        return replace(stream, tokens=stream.tokens + dit.control_adapter(self.rays))

    def in_window(self, window: Window) -> CameraMotion:
        """Return a `CameraMotion` with the camera rays of the frames of `window`."""
        return CameraMotion(window.cut(self.rays))


@unit("camera_motion", only_with="camera_control_direction")
def encode_camera_path(
    *,
    camera_control_direction: Direction | None = None,
    camera_control_speed: float = 1 / 54,
    camera_control_origin: tuple[float, ...] = ORIGIN,
    video_shape: VideoShape,
) -> CameraMotion:
    """Return a `CameraMotion` with the rays of the call's camera path."""
    assert camera_control_direction is not None, "the unit runs only with it"
    rays = camera_rays(
        camera_control_direction,
        num_frames=video_shape.num_frames,
        height=video_shape.height,
        width=video_shape.width,
        speed=camera_control_speed,
        origin=camera_control_origin,
    )
    # The frames of a latent frame become channels; the first frame is repeated to fill its latent frame.
    factor = video_shape.time_factor
    frames = torch.cat([rays[:, :1].expand(-1, factor - 1, -1, -1), rays], dim=1)
    folded = frames.unflatten(1, (-1, factor)).transpose(1, 2).flatten(0, 1)
    return CameraMotion(folded[None].to(video_shape.device, video_shape.dtype))


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a camera path that the network does not take, or a first camera that does not have 19
    numbers.
    """
    direction = values["camera_control_direction"]
    check_origin(values["camera_control_origin"])
    if direction is None:
        return
    if configs["dit"] is not None and not configs["dit"].camera_channels:
        raise ValueError("camera_control_direction is given, but this network takes none; load a Control-Camera model")


CAMERA = Feature(
    "camera",
    arguments=CameraArguments,
    units=(encode_camera_path,),
    conditions={"camera_motion": Condition(in_window, batch="separate")},
    check=check,
    other_arguments={
        "control_camera_video": (
            "camera_control_direction and camera_control_speed take its place; only the manual of DiffSynth-Studio has "
            "this name"
        )
    },
)


def camera_rays(
    direction: str,
    *,
    num_frames: int,
    height: int,
    width: int,
    speed: float = 1 / 54,
    origin: Sequence[float] = ORIGIN,
) -> Float[Tensor, "6 t height width"]:
    """Return a tensor `6 t height width`: Plücker coordinates (moment, direction) of each pixel's ray; fp32, CPU.

    Args:
        direction: rotation of the camera, one of `DIRECTIONS`.
        num_frames, height, width: size of the video.
        speed: change of the matrix entry from frame to frame.
        origin: first camera, in the format of `ORIGIN`.

    Raises:
        ValueError: the direction is unknown, or `origin` does not have 19 numbers.
    """
    check_direction(direction)
    check_origin(origin)
    poses = _relative_poses(_world_to_camera(direction, num_frames, speed, origin))
    directions = _pixel_directions(origin, height, width)
    rotated = torch.einsum("tij,jhw->tihw", poses[:, :3, :3], directions)
    centres = poses[:, :3, 3, None, None].expand_as(rotated)
    moments = torch.linalg.cross(centres, rotated, dim=1)
    return rearrange(torch.cat([moments, rotated], dim=1), "t c h w -> c t h w")


def check_direction(direction: str) -> None:
    """Raise ValueError for an unknown direction of rotation.

    Raises:
        ValueError: with the nearest spelling.
    """
    if direction not in DIRECTIONS:
        raise ValueError(
            f"camera_control_direction={direction!r}: expected one of {', '.join(DIRECTIONS)}"
            f"{did_you_mean(str(direction), DIRECTIONS)}"
        )


def check_origin(origin: Sequence[float]) -> None:
    """Raise ValueError for a first camera that does not have 19 numbers.

    Raises:
        ValueError: with the number of its entries, or the first that is no number.
    """
    if isinstance(origin, str) or not isinstance(origin, Sequence):
        raise ValueError(f"camera_control_origin={origin!r:.80}: expected {len(ORIGIN)} numbers, see ORIGIN")
    if len(origin) != len(ORIGIN):
        raise ValueError(f"camera_control_origin has {len(origin)} numbers; expected {len(ORIGIN)}, see ORIGIN")
    if other := [entry for entry in origin if isinstance(entry, bool) or not isinstance(entry, int | float)]:
        raise ValueError(f"camera_control_origin has the entry {other[0]!r}; expected numbers")


def _world_to_camera(direction: str, num_frames: int, speed: float, origin: Sequence[float]) -> Float[Tensor, "t 4 4"]:
    first = torch.eye(4, dtype=torch.float64)
    first[:3] = torch.tensor(origin[7:], dtype=torch.float64).view(3, 4)
    matrices = first.repeat(num_frames, 1, 1)
    elapsed = torch.arange(num_frames, dtype=torch.float64)
    for name, (row, sign) in _STEPS.items():
        if name in direction:
            matrices[:, row, 2] += sign * speed * elapsed
    return matrices


def _relative_poses(world_to_camera: Float[Tensor, "t 4 4"]) -> Float[Tensor, "t 4 4"]:
    """Return an fp32 tensor `t 4 4`: for each frame, the matrix from its camera's coordinates to those of the first
    camera.
    """
    poses = world_to_camera[0] @ torch.linalg.inv(world_to_camera)
    poses[0] = torch.eye(4, dtype=poses.dtype)
    return poses.float()


def _pixel_directions(origin: Sequence[float], height: int, width: int) -> Float[Tensor, "3 h w"]:
    """Return a tensor `3 h w` of unit vectors through the centre of each pixel, in camera coordinates."""
    focal_x, focal_y, centre_x, centre_y = origin[1:5]
    if width / height < _SCREEN:
        focal_x *= height * _SCREEN / width
    else:
        focal_y *= width / _SCREEN / height
    across = (torch.arange(width) + 0.5 - centre_x * width) / (focal_x * width)
    down = (torch.arange(height) + 0.5 - centre_y * height) / (focal_y * height)
    down, across = torch.meshgrid(down, across, indexing="ij")
    directions = torch.stack([across, down, torch.ones_like(across)])
    return directions / directions.norm(dim=0)
