"""Functions for single images: reading, resizing, and a contact sheet of video frames."""

from __future__ import annotations

import io
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from diffsynth.errors import CorruptFile, DownloadFailed, NoFiles

logger = logging.getLogger(__name__)


def read_image(
    source: str | Path, mode: str | None = "RGB", *, timeout: float = 30, max_trials: int = 3
) -> Image.Image:
    """Return the PIL image of a file or a URL, converted to `mode` ("RGB"); with None, the mode of the file is kept.

    Args:
        source: path, or a URL that begins with `http://` or `https://`.
        mode: mode of PIL to convert to, "RGB" or "RGBA"; None keeps that of the file.
        timeout: seconds to wait for a response.
        max_trials: number of download attempts; the pause between them grows by one second.

    Raises:
        NoFiles: the file does not exist.
        DownloadFailed: the URL could not be downloaded.
        CorruptFile: the content is not an image.
    """
    is_url = str(source).startswith(("http://", "https://"))
    if not is_url and not Path(source).is_file():
        raise NoFiles(f"image {source} {'is a folder' if Path(source).is_dir() else 'does not exist'}")
    file = io.BytesIO(_download(str(source), timeout, max_trials)) if is_url else source
    try:
        with Image.open(file) as image:
            image.load()
            return image.convert(mode) if mode else image.copy()
    except (UnidentifiedImageError, OSError) as error:
        raise CorruptFile(f"{source} is not an image that can be read: {error}") from error


def _download(url: str, timeout: float, max_trials: int) -> bytes:
    for trial in range(1, max(max_trials, 1) + 1):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise DownloadFailed(f"{url} returns {error.code} {error.reason}; check the URL") from error
            failure: OSError = error
        except OSError as error:
            failure = error
        logger.warning("%s cannot be downloaded (%s), trial %d of %d", url, failure, trial, max_trials)
        if trial < max_trials:
            time.sleep(trial)
    raise DownloadFailed(f"{url} cannot be downloaded in {trial} trials: {failure}") from failure


def cover(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Return the PIL image scaled to cover `height` x `width` pixels and cropped to this size about its centre; `image`
    itself if it has the size.
    """
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    size = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    scaled = image.resize(size, resample)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def contact_sheet(
    frames: Sequence[Image.Image], *, columns: int = 4, rows: int = 3, width: int = 320, gap: int = 4
) -> Image.Image:
    """Return one RGB PIL image, a grid in reading order of at most `columns * rows` evenly spaced frames of a video,
    from the first to the last frame (the first alone if there is room for one).

    Only the shown frames are accessed, in order, so `frames` may be a `VideoData` of any length.

    Args:
        frames: at least one frame; all of one shape.
        columns: frames side by side.
        rows: rows of frames; fewer if there are not enough frames.
        width: width of each frame in pixels; the height follows from its shape.
        gap: pixels between frames.

    Raises:
        ValueError: no frames, or a number that is not positive.
    """
    if not len(frames):
        raise ValueError("0 frames; expected at least one")
    if min(columns, rows, width) < 1 or gap < 0:
        raise ValueError(f"columns={columns}, rows={rows}, width={width}, gap={gap}: expected positive numbers")
    count = min(columns * rows, len(frames))
    columns = min(columns, count)
    chosen = [round(index * (len(frames) - 1) / max(count - 1, 1)) for index in range(count)]
    sheet = None
    for position, index in enumerate(chosen):
        frame = frames[index]
        height = max(round(width * frame.height / frame.width), 1)
        if sheet is None:
            lines = -(-count // columns)
            sheet = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), "black")
        row, column = divmod(position, columns)
        sheet.paste(frame.convert("RGB").resize((width, height)), (column * (width + gap), row * (height + gap)))
    assert sheet is not None
    return sheet
