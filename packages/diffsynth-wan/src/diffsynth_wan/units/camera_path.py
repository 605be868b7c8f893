"""The rays of a camera that turns, as Control-Camera models were trained on them (CameraCtrl, arXiv:2404.02101)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffsynth.errors import did_you_mean

ORIGIN = (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
"""A line of a camera file: time; focal lengths and centre as shares of width and height; two zeros; the rows of a
3 x 4 matrix from world to camera."""

DIRECTIONS = ("Left", "Right", "Up", "Down", "LeftUp", "LeftDown", "RightUp", "RightDown")
_STEPS = {"Left": (0, 1.0), "Right": (0, -1.0), "Up": (1, 1.0), "Down": (1, -1.0)}
"""Row of the matrix whose third entry changes with each frame, and its sign."""

_SCREEN = 1280 / 720
"""Width over height of the pictures that the focal lengths are of."""


def camera_rays(
    direction: str,
    *,
    num_frames: int,
    height: int,
    width: int,
    speed: float = 1 / 54,
    origin: Sequence[float] = ORIGIN,
) -> Float[Tensor, "6 t height width"]:
    """Plücker coordinates (moment, direction) of the ray through each pixel of each frame; fp32 on the CPU.

    Args:
        direction: one of `DIRECTIONS`.
        num_frames, height, width: of the video.
        speed: change of the matrix from frame to frame.
        origin: the first camera, see `ORIGIN`.

    Raises:
        ValueError: an unknown direction, or an origin that is no camera line.
    """
    check_camera(direction, origin)
    poses = _relative_poses(_world_to_camera(direction, num_frames, speed, origin))
    directions = _pixel_directions(origin, height, width)
    turned = torch.einsum("tij,jhw->tihw", poses[:, :3, :3], directions)
    places = poses[:, :3, 3, None, None].expand_as(turned)
    moments = torch.linalg.cross(places, turned, dim=1)
    return rearrange(torch.cat([moments, turned], dim=1), "t c h w -> c t h w")


def check_camera(direction: str, origin: Sequence[float]) -> None:
    """Raise what `camera_rays` raises for these."""
    if direction not in DIRECTIONS:
        raise ValueError(
            f"camera_control_direction={direction!r}: expected one of {', '.join(DIRECTIONS)}"
            f"{did_you_mean(str(direction), DIRECTIONS)}"
        )
    if len(origin) != len(ORIGIN):
        raise ValueError(f"camera_control_origin has {len(origin)} numbers; expected {len(ORIGIN)}, see ORIGIN")


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
    """From each camera to the first."""
    poses = world_to_camera[0] @ torch.linalg.inv(world_to_camera)
    poses[0] = torch.eye(4, dtype=poses.dtype)
    return poses.float()


def _pixel_directions(origin: Sequence[float], height: int, width: int) -> Float[Tensor, "3 h w"]:
    """Unit vectors through the centres of pixels, in the camera's own axes."""
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
