"""Condition images of a ControlNet: `Annotator`, and Canny's edge detector in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from diffsynth.core.data.color import to_rgb
from diffsynth.errors import Unavailable, did_you_mean

_UNCHANGED = ("tile", "none", "inpaint")
_NEED_MODELS = ("depth", "softedge", "lineart", "lineart_anime", "openpose", "normal")
PROCESSORS = ("canny", *_UNCHANGED, *_NEED_MODELS)
_NEIGHBOURS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


class Annotator:
    """Callable that computes the condition image of an image.

    Args:
        processor_id: "canny" detects edges; "tile", "none" and "inpaint" return the image unchanged.
        model_path: folder of the networks of other processors; unused.
        detect_resolution: pixels of the shorter side for edge detection; None is the image's own size.
        device: device of the networks of other processors; unused.
        skip_processor: return the image unchanged, whatever the processor.

    Raises:
        ValueError: unknown processor.
        Unavailable: a processor that needs a network, which this version does not include.
    """

    def __init__(
        self,
        processor_id: str,
        model_path: str = "models/Annotators",
        detect_resolution: int | None = None,
        device: Any = None,
        skip_processor: bool = False,
    ) -> None:
        if processor_id not in PROCESSORS:
            raise ValueError(
                f"processor_id={processor_id!r} is unknown{did_you_mean(processor_id, PROCESSORS)}; "
                f"expected one of {', '.join(PROCESSORS)}"
            )
        if processor_id in _NEED_MODELS and not skip_processor:
            raise Unavailable(
                f"Annotator({processor_id!r}) needs a network that this version does not include. Compute the "
                f"condition image with another program and pass it as it is, or use 'canny'."
            )
        self.processor_id = processor_id
        self.detect_resolution = detect_resolution
        self.skip_processor = skip_processor

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the condition image, RGB, of the image's size."""
        image = to_rgb(image)
        if self.skip_processor or self.processor_id in _UNCHANGED:
            return image
        if self.detect_resolution is None:
            return canny(image)
        scale = self.detect_resolution / min(image.size)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        return canny(small).resize(image.size, Image.Resampling.BICUBIC)


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Return an RGB PIL image, of the size of `image`, that shows its edges as white lines, one pixel wide, on black.

    Canny 1986, doi:10.1109/TPAMI.1986.4767851.

    Args:
        image: the image; its grey levels are not blurred.
        low: gradients (|dx| + |dy| of 3x3 Sobel sums over levels 0 to 255) of at least this value continue an edge.
        high: gradients of at least this value start an edge.

    Raises:
        ValueError: low above high.
    """
    if low > high:
        raise ValueError(f"low={low} is above high={high}")
    grey = np.asarray(to_rgb(image).convert("L"), dtype=np.float32)
    dx, dy = _sobel(grey)
    strength = np.abs(dx) + np.abs(dy)
    ridge = np.where(_is_ridge(strength, dx, dy), strength, 0)
    edges = _connected(ridge >= high, ridge >= low)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2).astype(np.uint8) * 255)


def _sobel(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two float arrays of the shape of `grey`, the gradients along x and along y as 3x3 Sobel sums; border
    pixels are repeated.
    """
    padded = np.pad(grey, 1, mode="edge")
    along_y = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    along_x = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return along_y[:, 2:] - along_y[:, :-2], along_x[2:] - along_x[:-2]


def _is_ridge(strength: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return a bool array: True where `strength` is larger than the one neighbour along the gradient and at least as
    large as the other; the direction is rounded to a multiple of 45 degrees.
    """
    slope = np.arctan2(dy, dx)
    direction = np.round(slope / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(strength.shape, dtype=bool)
    for sector, (down, right) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        # Strict on one side only, so that of two equal neighbours one remains.
        largest = (strength > _neighbour(strength, -down, -right)) & (strength >= _neighbour(strength, down, right))
        ridge |= (direction == sector) & largest
    return ridge


def _neighbour(values: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = values.shape
    padded = np.pad(values, 1)
    return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]


def _connected(seeds: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return a bool array: True for the pixels in `seeds`, and for those in `candidates` that a path of candidates,
    adjacent also diagonally, links to a seed.
    """
    width = seeds.shape[1] + 2
    reached = np.pad(seeds, 1).ravel()
    open_ = np.pad(candidates, 1).ravel() & ~reached
    steps = np.array([down * width + right for down, right in _NEIGHBOURS])
    front = np.flatnonzero(reached)
    while front.size:
        around = np.unique(front[:, None] + steps)
        front = around[open_[around]]
        open_[front] = False
        reached[front] = True
    return reached.reshape(-1, width)[1:-1, 1:-1]
