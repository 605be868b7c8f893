"""Functions for single images: reading, resizing, and a contact sheet of video frames."""

from __future__ import annotations

import functools
import io
import re
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from PIL import Image, ImageFile, UnidentifiedImageError

from diffsynth._env import max_image_pixels
from diffsynth.core.data.code_points import note_code_points
from diffsynth.core.data.color import WHITE, Color, rgb_of, to_mask, to_rgb, to_rgba, upright, upright_size
from diffsynth.core.data.content import describe, describe_file, existing_file
from diffsynth.errors import CorruptFile, DiffsynthError, DownloadFailed
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

ResizeMode: TypeAlias = Literal["stretch", "crop", "pad"]
"""Ways to scale an image of another aspect ratio to a size: "stretch" changes its proportions, "crop" covers the size
and cuts both ends off, "pad" fits into the size and adds black at both ends.
"""

_SCALED_WHOLE = 4
"""Largest ratio of the scaled image's area to the area that stays, up to which an image is scaled whole."""


def read_image(
    source: str | Path,
    mode: str | None = "RGB",
    *,
    background: Color = WHITE,
    max_pixels: int | None = None,
    timeout: float = 30,
    max_trials: int = 3,
) -> Image.Image:
    """Return the PIL image of a file or a URL, upright, converted to `mode` ("RGB") in sRGB as `color.to_rgb` has it.

    An animated image gives its first frame; `VideoData` reads all of them.

    Args:
        source: path, or a URL that begins with `http://` or `https://`.
        mode: "RGB"; "RGBA", with transparency; "L", a mask as `color.to_mask` has it; None keeps mode, colours and
            transparency of the file, which pipelines convert.
        background: colour below transparent pixels, for mode "RGB".
        max_pixels: largest number of pixels; None is `DIFFSYNTH_MAX_IMAGE_PIXELS`.
        timeout: seconds to wait for a response.
        max_trials: number of download attempts; the pause between them grows by one second.

    Raises:
        TypeError: `source` is neither a text nor a path.
        NoFiles: the file does not exist.
        DownloadFailed: the URL could not be downloaded.
        CorruptFile: the content is not an image, or is cut off.
        ValueError: an image of too many pixels, an unknown mode or colour, or levels of an unknown range.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        content: Path | bytes = _download(source, timeout, max_trials)
    else:
        content = existing_file(source, "image")
    return decode_image(content, str(source), mode, background=background, max_pixels=max_pixels)


def decode_image(
    content: Path | bytes,
    name: str,
    mode: str | None = "RGB",
    *,
    background: Color = WHITE,
    max_pixels: int | None = None,
    formats: Sequence[str] | None = None,
) -> Image.Image:
    """Return the PIL image in a file or in bytes, as `read_image` does.

    Args:
        content: path of an existing file, or the content of one.
        name: of the image, for messages.
        mode, background, max_pixels: see `read_image`.
        formats: names that PIL has for the formats to accept, such as "PNG"; None accepts all.

    Raises:
        CorruptFile, ValueError: see `read_image`.
    """
    convert = _conversion(mode, background)
    with opened_image(content, name, max_pixels=max_pixels, formats=formats) as image:
        turned = upright(image)
        try:
            return convert(turned)
        except ValueError as error:
            raise _Refused(f"{name}: {error}") from error


def size_of(path: Path) -> tuple[int, int]:
    """Return (width, height) in pixels of an image file, upright, from its header; raises like `decode_image`."""
    with opened_image(existing_file(path, "image"), str(path)) as image:
        return upright_size(image)


@contextmanager
def opened_image(
    content: Path | bytes, name: str, *, max_pixels: int | None = None, formats: Sequence[str] | None = None
) -> Iterator[ImageFile.ImageFile]:
    """Context manager that opens an image file and yields it as PIL has it, its pixels not yet decoded; errors of PIL
    in its body become `CorruptFile`. Arguments and errors are those of `decode_image`.
    """
    limit = max_image_pixels() if max_pixels is None else max_pixels
    try:
        with _open(content, limit, formats) as image:
            if image.width * image.height > limit:
                raise _too_large(name, f"{image.width}x{image.height} = {image.width * image.height}", limit)
            note_code_points(image)
            yield image
    except Image.DecompressionBombError as error:
        raise _too_large(name, next(iter(re.findall(r"\d+", str(error))), "too many"), limit) from None
    except (DiffsynthError, _Refused):
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            found = describe(content) if isinstance(content, bytes) else _described(content)
            damage = " that is cut off or damaged" if found.endswith(" image") else ""
            reason = f"cannot identify image; it is {found}{damage}"
        raise CorruptFile(f"{name} is not an image that can be read: {reason}") from error


class _Refused(ValueError):
    """An image that this library refuses, in contrast to the ValueErrors that PIL raises for damaged files."""


def _too_large(name: str, pixels: str, limit: int) -> _Refused:
    return _Refused(
        f"{name} has {pixels} pixels; at most {limit} are read. Scale it down, or set DIFFSYNTH_MAX_IMAGE_PIXELS"
    )


def _conversion(mode: str | None, background: Color) -> Callable[[Image.Image], Image.Image]:
    conversions: dict[str | None, Callable[[Image.Image], Image.Image]] = {
        "RGB": functools.partial(to_rgb, background=rgb_of(background)),
        "RGBA": to_rgba,
        "L": to_mask,
        None: lambda image: image,
    }
    if mode not in conversions:
        raise ValueError(f"mode={mode!r}: expected 'RGB', 'RGBA', 'L' for masks, or None for that of the file")
    return conversions[mode]


def _open(content: Path | bytes, limit: int, formats: Sequence[str] | None) -> ImageFile.ImageFile:
    """Return the image as PIL opens it, without PIL's own limit if `limit` is larger."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    if Image.MAX_IMAGE_PIXELS is None or limit <= 2 * Image.MAX_IMAGE_PIXELS:
        return Image.open(file) if formats is None else Image.open(file, formats=list(formats))
    data = io.BytesIO(content if isinstance(content, bytes) else content.read_bytes())
    Image.init()
    prefix = data.read(16)
    for factory, accepts in (Image.OPEN[name] for name in formats or Image.ID):
        if accepts is None or accepts(prefix) is True:
            data.seek(0)
            try:
                return factory(data, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise UnidentifiedImageError("cannot identify image file")


def _described(path: Path) -> str:
    try:
        return describe_file(path)
    except OSError as error:
        return f"unreadable ({error.strerror})"


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

    Raises:
        ValueError: an image without pixels.
    """
    if image.size == (width, height):
        return image
    if not image.width or not image.height:
        raise ValueError(f"an image of {image.width}x{image.height} has no pixels")
    scale = max(width / image.width, height / image.height)
    size = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    if size[0] * size[1] > _SCALED_WHOLE * width * height:  # a long strip: only the part that stays is scaled
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        across, down = image.width / size[0], image.height / size[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return image.resize((width, height), resample, box=box)
    return center_crop(image.resize(size, resample), height, width)


def fit(
    image: Image.Image,
    height: int,
    width: int,
    *,
    resize_mode: ResizeMode,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """Return the PIL image at `height` x `width` pixels; `image` itself if it has this size.

    Args:
        image: a PIL image.
        height, width: the new size in pixels.
        resize_mode: what happens if the aspect ratios differ, see `ResizeMode`.
        resample: PIL's filter.

    Raises:
        ValueError: an image without pixels.
    """
    if resize_mode == "crop" or image.size == (width, height):
        return cover(image, height, width, resample)
    if not image.width or not image.height:
        raise ValueError(f"an image of {image.width}x{image.height} has no pixels")
    if resize_mode == "stretch":
        return image.resize((width, height), resample)
    scale = min(width / image.width, height / image.height)
    inner = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), resample)
    padded = Image.new(image.mode, (width, height))
    padded.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return padded


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return the `height` x `width` pixels about the centre of a PIL image, which is not smaller and is not scaled."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def crop_to_multiple(image: Image.Image, multiple: int) -> Image.Image:
    """Return the central part of a PIL image whose sides are the largest multiples of `multiple` pixels, unscaled."""
    return center_crop(image, image.height // multiple * multiple, image.width // multiple * multiple)


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
        sheet.paste(to_rgb(frame).resize((width, height)), (column * (width + gap), row * (height + gap)))
    assert sheet is not None
    return sheet
