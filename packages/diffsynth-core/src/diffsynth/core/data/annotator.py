"""Condition images of a ControlNet: `Annotator`, and Canny's edge detector in numpy.

Networks that detect depth, lines and poses are those of the library `controlnet_aux`, which is no dependency.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from diffsynth.core.data.color import to_rgb
from diffsynth.errors import NoFiles, Unavailable, did_you_mean

DETECTORS: Mapping[str, str] = MappingProxyType(
    {
        "depth": "MidasDetector",
        "softedge": "HEDdetector",
        "lineart": "LineartDetector",
        "lineart_anime": "LineartAnimeDetector",
        "openpose": "OpenposeDetector",
        "normal": "NormalBaeDetector",
    }
)
"""Processor -> its class in `controlnet_aux.processor`."""

_UNCHANGED = ("tile", "none", "inpaint")
PROCESSORS = ("canny", *_UNCHANGED, *DETECTORS)
_OPTIONS = {"openpose": {"include_body": True, "include_hand": True, "include_face": True}}
_SMALLEST = 64
"""Smallest shorter side, in pixels, that the networks take: they round sides to multiples of it."""

_NEIGHBOURS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


class Annotator:
    """Callable that computes the condition image of an image.

    "canny" detects edges, "tile", "none" and "inpaint" return the image unchanged. All others, "depth", "softedge",
    "lineart", "lineart_anime", "openpose" and "normal", are networks of the library `controlnet_aux`
    (`pip install "diffsynth-core[annotators]"`), whose weights are read from `model_path`.

    Args:
        processor_id: the processor.
        model_path: folder or hub id of the networks' weights, as of the repository `lllyasviel/Annotators`.
        detect_resolution: pixels of the shorter side for the detection, at least 1, and at least 64 for networks; None
            is the image's own size, and for networks 64 if that is smaller.
        device: device of the networks; None is the CPU.
        skip_processor: return the image unchanged, whatever the processor.

    Raises:
        TypeError: the processor's name is no text, or the resolution no whole number.
        ValueError: unknown processor, or a resolution that is too small.
        Unavailable: a processor that needs `controlnet_aux`, which is not installed or cannot be imported.
        NoFiles: the weights of its network cannot be loaded from `model_path`.
    """

    def __init__(
        self,
        processor_id: str,
        model_path: str = "models/Annotators",
        detect_resolution: int | None = None,
        device: Any = None,
        skip_processor: bool = False,
    ) -> None:
        if not isinstance(processor_id, str):
            raise TypeError(f"processor_id={processor_id!r}: expected the name of a processor, such as 'canny'")
        if processor_id not in PROCESSORS:
            raise ValueError(
                f"processor_id={processor_id!r} is unknown{did_you_mean(processor_id, PROCESSORS)}; "
                f"expected one of {', '.join(PROCESSORS)}"
            )
        if detect_resolution is not None:
            _check_resolution(detect_resolution, smallest=_SMALLEST if processor_id in DETECTORS else 1)
        self.processor_id = processor_id
        self.detect_resolution = detect_resolution
        self.skip_processor = skip_processor
        self.detector: Any = None
        if processor_id in DETECTORS and not skip_processor:
            self.detector = _load_detector(processor_id, model_path)
            self.to("cpu" if device is None else device)

    def to(self, device: Any) -> Annotator:
        """Move the processor's network to `device`, if it has one; return the annotator itself."""
        if self.detector is not None:
            self.detector.to(device)
        return self

    def __call__(self, image: Image.Image, mask: Image.Image | None = None) -> Image.Image:
        """Return the condition image, RGB, of the image's size.

        Args:
            image: the image.
            mask: accepted for scripts for DiffSynth-Studio and not used.

        Raises:
            TypeError: the image is no PIL image.
            ValueError: an image that cannot be converted, see `diffsynth.core.data.color.to_rgb`.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"image={image!r:.80}: expected a PIL image, such as Image.open(path)")
        image = to_rgb(image)
        if self.skip_processor or self.processor_id in _UNCHANGED:
            return image
        shorter = min(image.size) if self.detector is None else max(min(image.size), _SMALLEST)
        detect = shorter if self.detect_resolution is None else self.detect_resolution
        if self.detector is not None:
            options = _OPTIONS.get(self.processor_id, {})
            found = self.detector(image, detect_resolution=detect, image_resolution=shorter, **options)
            return to_rgb(found).resize(image.size, Image.Resampling.BICUBIC)
        if detect == shorter:
            return canny(image)
        scale = detect / shorter
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        return canny(small).resize(image.size, Image.Resampling.BICUBIC)


def _check_resolution(pixels: Any, *, smallest: int) -> None:
    if isinstance(pixels, bool) or not isinstance(pixels, int):
        raise TypeError(f"detect_resolution={pixels!r}: expected a whole number of pixels, or None")
    if pixels < smallest:
        raise ValueError(f"detect_resolution={pixels}: expected at least {smallest} pixels, or None")


def _load_detector(processor_id: str, model_path: str) -> Any:
    """Return the network of a processor with the weights of a folder or hub id; raise NoFiles without them."""
    try:
        # A class of controlnet_aux: it reads weights by name, and runs no code of a repository.
        return _detector_class(processor_id).from_pretrained(model_path)
    except Unavailable:
        raise
    except Exception as error:  # those of the hub's client and of reading files
        raise NoFiles(
            f"Annotator({processor_id!r}): the weights of {DETECTORS[processor_id]} cannot be loaded from "
            f"model_path={model_path!r} ({type(error).__name__}: {error!s:.200}). Download the repository "
            "lllyasviel/Annotators and pass its folder, or model_path='lllyasviel/Annotators'"
        ) from error


def _detector_class(processor_id: str) -> Any:
    """Import and return the class of a processor's network; raise Unavailable if that is not possible."""
    try:
        return getattr(importlib.import_module("controlnet_aux.processor"), DETECTORS[processor_id])
    except Exception as error:  # the library imports several others, which raise whatever they do
        raise Unavailable(
            f"Annotator({processor_id!r}) needs {DETECTORS[processor_id]} of the library controlnet_aux, which cannot "
            f"be imported ({type(error).__name__}: {error}). Install it: pip install 'diffsynth-core[annotators]'; or "
            "compute the condition image with another program and pass it as it is, or use 'canny'"
        ) from error


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Return an RGB PIL image, of the size of `image`, that shows its edges as white lines, one pixel wide, on black.

    Canny 1986, doi:10.1109/TPAMI.1986.4767851; pixel for pixel that of `cv2.Canny(rgb, low, high)`, which ControlNets
    were trained with.

    Args:
        image: the image; its levels are not blurred.
        low: gradients (|dx| + |dy| of 3x3 Sobel sums over levels 0 to 255, of the channel where it is largest) above
            this value continue an edge.
        high: gradients above this value start an edge.

    Raises:
        ValueError: low above high.
    """
    if low > high:
        raise ValueError(f"low={low} is above high={high}")
    dx, dy = _sobel(np.asarray(to_rgb(image), dtype=np.int32))
    strength = np.abs(dx) + np.abs(dy)
    largest = strength.argmax(axis=2, keepdims=True)
    strength, dx, dy = (np.take_along_axis(each, largest, axis=2)[:, :, 0] for each in (strength, dx, dy))
    ridge = np.where(_is_ridge(strength, dx, dy), strength, 0)
    edges = _connected(ridge > high, ridge > low)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2).astype(np.uint8) * 255)


def _sobel(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two integer arrays of the shape of `levels`, `h w c`: the gradients along x and along y as 3x3 Sobel sums;
    border pixels are repeated.
    """
    padded = np.pad(levels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    along_y = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    along_x = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return along_y[:, 2:] - along_y[:, :-2], along_x[2:] - along_x[:-2]


_TAN = 13573
"""The tangent of 22.5 degrees times 2**15: directions are rounded to multiples of 45 degrees in integers."""


def _is_ridge(strength: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return a bool array: True where `strength` is larger than the two neighbours along the gradient, whose direction
    is rounded to a multiple of 45 degrees; of two equal neighbours in a row or column one is True.
    """
    low, x, y = np.abs(dx) * _TAN, np.abs(dx), np.abs(dy) << 15
    is_across, is_down = y < low, y > low + (x << 16)
    # The other two are diagonals: from top left to bottom right where both gradients have one sign.
    is_falling = ~is_across & ~is_down & ((dx < 0) == (dy < 0))
    is_rising = ~is_across & ~is_down & ~is_falling
    ridge = np.zeros(strength.shape, dtype=bool)
    for sector, down, right in ((is_across, 0, 1), (is_down, 1, 0)):
        # Strict on one side only, so that of two equal neighbours one remains.
        first, second = _neighbour(strength, -down, -right), _neighbour(strength, down, right)
        ridge |= sector & (strength > first) & (strength >= second)
    for sector, right in ((is_falling, 1), (is_rising, -1)):
        ridge |= sector & (strength > _neighbour(strength, -1, -right)) & (strength > _neighbour(strength, 1, right))
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
