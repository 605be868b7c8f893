"""Canny's edge detector (Canny 1986, doi:10.1109/TPAMI.1986.4767851), in numpy."""

from __future__ import annotations

import numpy as np
from PIL import Image

_RING = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Edges as white lines, one pixel wide, on black; RGB, of the image's size.

    Args:
        image: its grey levels are looked at, unblurred.
        low: gradients (|dx| + |dy| of 3x3 Sobel sums, as of levels 0 to 255) from here up continue an edge.
        high: from here up they begin one.

    Raises:
        ValueError: low above high.
    """
    if low > high:
        raise ValueError(f"low={low} is above high={high}")
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    dx, dy = _sobel(grey)
    strength = np.abs(dx) + np.abs(dy)
    ridge = np.where(_is_ridge(strength, dx, dy), strength, 0)
    edges = _connected(ridge >= high, ridge >= low)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2).astype(np.uint8) * 255)


def _sobel(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of differences along x and along y; the border repeats."""
    padded = np.pad(grey, 1, mode="edge")
    along_y = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    along_x = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return along_y[:, 2:] - along_y[:, :-2], along_x[2:] - along_x[:-2]


def _is_ridge(strength: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Where a gradient is the largest along its own direction, which is rounded to one of four."""
    slope = np.arctan2(dy, dx)
    direction = np.round(slope / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(strength.shape, dtype=bool)
    for sector, (down, right) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        # Strict on one side only: of two equal neighbours one stays.
        largest = (strength > _neighbour(strength, -down, -right)) & (strength >= _neighbour(strength, down, right))
        ridge |= (direction == sector) & largest
    return ridge


def _neighbour(values: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = values.shape
    padded = np.pad(values, 1)
    return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]


def _connected(seeds: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidates that touch a seed, by a chain of candidates; works on the front alone."""
    width = seeds.shape[1] + 2
    reached = np.pad(seeds, 1).ravel()
    open_ = np.pad(candidates, 1).ravel() & ~reached
    steps = np.array([down * width + right for down, right in _RING])
    front = np.flatnonzero(reached)
    while front.size:
        around = np.unique(front[:, None] + steps)
        front = around[open_[around]]
        open_[front] = False
        reached[front] = True
    return reached.reshape(-1, width)[1:-1, 1:-1]
