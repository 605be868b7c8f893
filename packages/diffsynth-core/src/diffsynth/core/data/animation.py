"""`Animation`: the frames of an animated image (GIF, WebP, APNG, AVIF) and their times, decoded by PIL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageFile

from diffsynth.core.data.color import WHITE, Color, rgb_of, to_rgb
from diffsynth.core.data.content import IMAGE_KINDS, describe_file, existing_file
from diffsynth.core.data.image import opened_image
from diffsynth.errors import CorruptFile

_DEFAULT_DURATION = 100
"""Milliseconds: viewers show frames with a duration of 0, or without one, for a tenth of a second."""

_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")


class Animation:
    """The frames of an image file with their times; an image without animation has one frame.

    Args:
        path: the file.
        background: colour below transparent pixels.

    Raises:
        NoFiles: the file does not exist.
        ValueError: not a colour.
    """

    def __init__(self, path: str | Path, *, background: Color = WHITE) -> None:
        self.path = existing_file(path, "image")
        self.background = rgb_of(background)

    def frames(self) -> Iterator[tuple[float, float, Image.Image]]:
        """Yield (time, duration, frame) of each frame in order: its first time and its duration in seconds, and the
        frame as an RGB image, over the background where transparent.

        Raises:
            CorruptFile: the file is not an image, or is cut off; raised at the frame that cannot be read.
            ValueError: an image of too many pixels.
        """
        for time, duration, image in self._decoded():
            frame = to_rgb(image, background=self.background)
            # Seeking changes the opened image in place.
            yield time, duration, frame.copy() if frame is image else frame

    def times(self) -> tuple[tuple[float, ...], float]:
        """Return (first times of all frames in seconds, time at which the last one ends); raises like `frames`."""
        shown = [(time, duration) for time, duration, _ in self._decoded()]
        if not shown:
            raise CorruptFile(f"{self.path} has no frames")
        return tuple(time for time, _ in shown), sum(shown[-1])

    def _decoded(self) -> Iterator[tuple[float, float, ImageFile.ImageFile]]:
        """Yield (time, duration, opened image) of each frame, as PIL has it and valid until the next one."""
        milliseconds = 0.0
        with opened_image(self.path, str(self.path)) as image:
            for index in _indices(image):
                self._seek(image, index)
                duration = float(image.info.get("duration") or _DEFAULT_DURATION)
                yield milliseconds / 1000, duration / 1000, image
                milliseconds += duration

    def _seek(self, image: ImageFile.ImageFile, index: int) -> None:
        try:
            image.seek(index)
            image.load()
        except Exception as error:  # PIL's decoders raise EOFError, OSError, SyntaxError, ValueError, struct.error, ...
            reason = str(error) or type(error).__name__
            raise CorruptFile(f"{self.path} cannot be read from frame {index} on: {reason}") from error


def is_image(path: Path) -> bool:
    """Return whether a file is an image, animated or not, by its first bytes.

    Raises:
        OSError: the file cannot be read.
    """
    return describe_file(path) in IMAGE_KINDS


def is_animated(path: Path) -> bool:
    """Return whether a file is an animated image of at least two frames.

    Raises:
        CorruptFile: the file is an image that cannot be read.
    """
    if not is_image(path):
        return False
    with opened_image(path, str(path)) as image:
        return len(_indices(image)) > 1


def _indices(image: ImageFile.ImageFile) -> range:
    if image.format not in _ANIMATED:  # the pages of a TIFF, or the images of a stereo photograph
        return range(1)
    # An APNG may have a separate still image, for viewers without animations; PIL counts it as the first frame.
    first = 1 if image.info.get("default_image") and getattr(image, "n_frames", 1) > 1 else 0
    return range(first, getattr(image, "n_frames", 1))
