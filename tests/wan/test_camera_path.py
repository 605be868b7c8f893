"""Rays of a camera: limits that are exact, and a naive twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsynth_wan.units.camera_path import DIRECTIONS, ORIGIN, camera_rays

SIZE = {"num_frames": 3, "height": 10, "width": 14}
SIGNS = {"Left": (9, 1), "Right": (9, -1), "Up": (13, 1), "Down": (13, -1)}
"""Which number of a camera's line changes, and how."""


def naive(direction, *, num_frames, height, width, speed):
    """Camera line by camera line, pixel by pixel."""
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
def test_equals_its_naive_twin(direction):
    got = camera_rays(direction, **SIZE, speed=0.02)
    assert torch.allclose(got, naive(direction, **SIZE, speed=0.02), atol=1e-5)


def test_a_wide_picture():
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
