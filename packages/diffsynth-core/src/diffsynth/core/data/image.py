"""Operators for single images."""

from __future__ import annotations

import io
import logging
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from diffsynth.core.data.operator_base import DataProcessingOperator
from diffsynth.errors import CorruptFile, DownloadFailed, NoFiles

logger = logging.getLogger(__name__)


def cover(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Scaled to cover height x width pixels, and cropped about its centre."""
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    size = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    scaled = image.resize(size, resample)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


class LoadImage(DataProcessingOperator):
    """An image from a file or an address.

    Args:
        convert_RGB: to three channels.
        convert_RGBA: to four channels; beats `convert_RGB`.
        url_timeout: seconds to wait for an answer.
        url_max_retries: how often to try, one second longer apart each time.
    """

    def __init__(
        self,
        convert_RGB: bool = True,  # noqa: N803
        convert_RGBA: bool = False,  # noqa: N803
        url_timeout: float = 30,
        url_max_retries: int = 3,
    ) -> None:
        self.mode = "RGBA" if convert_RGBA else "RGB" if convert_RGB else None
        self.url_timeout = url_timeout
        self.url_max_retries = url_max_retries

    def __call__(self, data: str | Path) -> Image.Image:
        """The image, read whole.

        Raises:
            NoFiles: there is no such file.
            DownloadFailed: the address did not answer.
            CorruptFile: what is there is no image.
        """
        is_address = str(data).startswith(("http://", "https://"))
        if not is_address and not Path(data).is_file():
            raise NoFiles(f"image {data} {'is a folder' if Path(data).is_dir() else 'does not exist'}")
        source = io.BytesIO(self._fetch(str(data))) if is_address else data
        try:
            with Image.open(source) as image:
                image.load()
                return image.convert(self.mode) if self.mode else image.copy()
        except (UnidentifiedImageError, OSError) as error:
            raise CorruptFile(f"{data} is not an image that can be read: {error}") from error

    def _fetch(self, address: str) -> bytes:
        for trial in range(1, max(self.url_max_retries, 1) + 1):
            try:
                with urllib.request.urlopen(address, timeout=self.url_timeout) as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise DownloadFailed(f"{address} answers {error.code} {error.reason}; check the address") from error
                failure: OSError = error
            except OSError as error:
                failure = error
            logger.warning("%s did not answer (%s), trial %d of %d", address, failure, trial, self.url_max_retries)
            if trial < self.url_max_retries:
                time.sleep(trial)
        raise DownloadFailed(f"{address} did not answer in {trial} trials: {failure}") from failure


class ImageCropAndResize(DataProcessingOperator):
    """An image of a size that a network takes.

    Args:
        height: in pixels; with `width`, the image is scaled to cover this size and cropped about its centre.
        width: likewise.
        max_pixels: without a size of its own, the image shrinks, in proportion, to at most this many pixels.
        height_division_factor: then the height is rounded down to a multiple of this.
        width_division_factor: likewise.

    Raises:
        ValueError: one of height and width alone.
    """

    def __init__(
        self,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int | None = None,
        height_division_factor: int = 1,
        width_division_factor: int = 1,
    ) -> None:
        if (height is None) != (width is None):
            raise ValueError(f"height={height} and width={width}: give both, or neither for the image's own")
        self.height, self.width = height, width
        self.max_pixels = max_pixels
        self.height_division_factor = height_division_factor
        self.width_division_factor = width_division_factor

    def get_height_width(self, image: Image.Image) -> tuple[int, int]:
        """The size that this image will have.

        Raises:
            ValueError: it has no multiple of the factors left.
        """
        if self.height is not None and self.width is not None:
            return self.height, self.width
        height, width = image.height, image.width
        if self.max_pixels is not None and height * width > self.max_pixels:
            scale = (self.max_pixels / (height * width)) ** 0.5
            height, width = int(height * scale), int(width * scale)
        height -= height % self.height_division_factor
        width -= width % self.width_division_factor
        if not height or not width:
            raise ValueError(
                f"image of {image.width}x{image.height} pixels is smaller than the factors "
                f"{self.width_division_factor}x{self.height_division_factor}; give a height and a width"
            )
        return height, width

    def __call__(self, data: Image.Image) -> Image.Image:
        """The resized image."""
        return cover(data, *self.get_height_width(data))
