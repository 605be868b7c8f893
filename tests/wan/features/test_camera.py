"""Camera rays: exact special cases, and a reference implementation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffsynth_wan.features.camera import DIRECTIONS, ORIGIN, camera_rays, encode_camera_path

SIZE = {"num_frames": 3, "height": 10, "width": 14}
SIGNS = {"Left": (9, 1), "Right": (9, -1), "Up": (13, 1), "Down": (13, -1)}
"""Number of the camera line that changes, and its sign."""


def naive(direction, *, num_frames, height, width, speed):
    """Return the rays, computed in loops over frames and pixels."""
    lines = [list(ORIGIN)]
    while len(lines) < num_frames:
        line = list(lines[-1])
        for name, (place, sign) in SIGNS.items():
            line[place] += sign * speed if name in direction else 0
        lines.append(line)
    matrices = [np.vstack([np.array(line[7:]).reshape(3, 4), [0, 0, 0, 1]]) for line in lines]
    fx, fy, cx, cy = ORIGIN[1:5]
    if width / height < 1280 / 720:
        fx = fx * (height * 1280 / 720) / width
    else:
        fy = fy * (width / (1280 / 720)) / height
    rays = np.zeros((6, num_frames, height, width))
    for t, matrix in enumerate(matrices):
        pose = np.eye(4) if t == 0 else matrices[0] @ np.linalg.inv(matrix)
        for y in range(height):
            for x in range(width):
                ray = np.array([(x + 0.5 - cx * width) / (fx * width), (y + 0.5 - cy * height) / (fy * height), 1])
                ray = pose[:3, :3] @ (ray / np.linalg.norm(ray))
                rays[:, t, y, x] = [*np.cross(pose[:3, 3], ray), *ray]
    return torch.from_numpy(rays).float()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_the_reference_implementation(direction):
    got = camera_rays(direction, **SIZE, speed=0.02)
    assert torch.allclose(got, naive(direction, **SIZE, speed=0.02), atol=1e-5)


def test_a_wide_image():
    size = {"num_frames": 2, "height": 16, "width": 64}
    assert torch.allclose(camera_rays("Up", **size, speed=0.1), naive("Up", **size, speed=0.1), atol=1e-5)


def test_without_speed_nothing_moves():
    rays = camera_rays("Left", **SIZE, speed=0.0)
    assert torch.allclose(rays, rays[:, :1].expand_as(rays), atol=1e-6)
    assert torch.allclose(rays[3:].norm(dim=0), torch.ones(3, 10, 14), atol=1e-5)
    assert torch.equal(rays[:3], torch.zeros(3, 3, 10, 14))


def test_an_origin_has_nineteen_numbers():
    with pytest.raises(ValueError, match="camera_control_origin has 3 numbers; expected 19"):
        camera_rays("Left", **SIZE, origin=(1, 2, 3))
    with pytest.raises(ValueError, match="camera_control_origin has the entry '0'; expected numbers"):
        camera_rays("Left", **SIZE, origin=("0",) * 19)


CORNER = (-0.631487, -0.346299, 0.693759)
"""Ray through the corner of 18 x 32 pixels, computed by hand.

Focal lengths are 0.532139961 x 32 = 0.946026558 x 18 = 17.02848 pixels: the centre of the corner pixel is at
((0.5 - 16) / 17.02848, (0.5 - 9) / 17.02848, 1), a vector of length 1.441423.
"""

TURNS = {
    "Left": (-1, 0),
    "Right": (1, 0),
    "Up": (0, -1),
    "Down": (0, 1),
    "LeftUp": (-1, -1),
    "LeftDown": (-1, 1),
    "RightUp": (1, -1),
    "RightDown": (1, 1),
}
"""Rays rotate with each frame. A matrix is [[1, 0, a], [0, 1, b], [0, 0, 1]]; its inverse has -a, -b."""


@pytest.mark.parametrize("direction", TURNS)
def test_the_corner_by_hand(direction):
    x, y, z = CORNER
    shift = 0.03 * z  # the fourth frame at 0.01
    expected = [0, 0, 0, x + TURNS[direction][0] * shift, y + TURNS[direction][1] * shift, z]
    rays = camera_rays(direction, num_frames=5, height=18, width=32, speed=0.01)
    assert rays[:, 3, 0, 0].tolist() == pytest.approx(expected, abs=2e-6)
    assert rays[:, 0, 0, 0].tolist() == pytest.approx([0, 0, 0, *CORNER], abs=2e-6)


def test_a_camera_elsewhere_by_hand():
    """With an origin at (1, 2, 3), the fourth camera is 0.09 along x from the first."""
    origin = (*ORIGIN[:10], 1, *ORIGIN[11:14], 2, *ORIGIN[15:18], 3)
    rays = camera_rays("Left", num_frames=4, height=18, width=32, speed=0.01, origin=origin)
    expected = [0, -0.09 * 0.693759, 0.09 * -0.346299, -0.652300, -0.346299, 0.693759]
    assert rays[:, 3, 0, 0].tolist() == pytest.approx(expected, abs=2e-6)


def test_the_usual_camera_and_its_speed():
    """`spec/features.md` A4: 1/54 per frame, and 19 numbers."""
    assert ORIGIN == (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    assert sorted(DIRECTIONS) == sorted(TURNS)
    usual = camera_rays("Up", num_frames=3, height=18, width=32)
    assert usual[4, 2, 0, 0].item() == pytest.approx(-0.346299 - 2 / 54 * 0.693759, abs=2e-6)


def test_the_frames_of_a_latent_frame_are_channels():
    """Channels are ordered by coordinate, then frame; the first frame is repeated four times."""
    video_shape = SimpleNamespace(num_frames=5, height=18, width=32, time_factor=4, device="cpu", dtype=torch.float32)
    motion = encode_camera_path(camera_control_direction="Left", camera_control_speed=0.01, video_shape=video_shape)
    assert motion.rays.shape == (1, 24, 2, 18, 32)
    corner = motion.rays[0, :, :, 0, 0]
    assert corner[12:16, 0].tolist() == pytest.approx([-0.631487] * 4, abs=2e-6)
    assert corner[12:16, 1].tolist() == pytest.approx([-0.631487 - 0.00693759 * t for t in (1, 2, 3, 4)], abs=2e-6)
