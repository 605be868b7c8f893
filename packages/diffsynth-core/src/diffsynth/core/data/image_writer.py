"""Writing of images and short animations, JPEG, WebP and GIF, with texts inside, each file replaced in one step.

Two texts are stored: a comment of the program, and a text in the form of A1111 that many programs read. JPEG and WebP
have both in EXIF (XPComment and UserComment), GIF the comment alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffsynth.core.arguments import check_number
from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.content import existing_file
from diffsynth.core.data.image import opened_image
from diffsynth.core.paths import expanded
from diffsynth.core.replacing import replacing
from diffsynth.errors import shown
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_EXIF, _USER_COMMENT, _XP_COMMENT = 0x8769, 0x9286, 0x9C9C
_UNICODE = b"UNICODE\0"
"""The first eight bytes of a UserComment in UTF-16; readers take the byte order for big endian."""

_JPEG_LIMIT = 65_533 - 8
"""Bytes of EXIF that one segment of a JPEG file holds."""


def save_jpeg(
    image: Image.Image,
    path: Path | str,
    *,
    quality: float = 95,
    comment: str | None = None,
    parameters: str | None = None,
) -> None:
    """Write an image to the file `path` as JPEG, without subsampling of colours.

    Args:
        image: of mode L or RGB; another mode without transparency is converted by `color.to_rgb`.
        path: the file, in a folder that exists.
        quality: 1 to 100.
        comment: text of the program, stored as XPComment.
        parameters: text in the form of A1111, stored as UserComment; left out with a warning if JPEG cannot hold both.

    Raises:
        TypeError: `image` is no PIL image.
        ValueError: an image with transparency, a quality out of range, or a comment above 64 KB.
        OSError: the folder does not exist or cannot be written.
    """
    _check(image)
    check_number("quality", quality, least=1, most=100)
    if image.has_transparency_data:
        raise ValueError(f"{path}: JPEG cannot hold transparency, and the image is of mode {image.mode}; write PNG")
    exif = _exif(comment, parameters)
    if len(exif) > _JPEG_LIMIT and parameters is not None:
        logger.warning("%s: the A1111 parameters are left out: JPEG holds 64 KB of texts", path)
        exif = _exif(comment, None)
    if len(exif) > _JPEG_LIMIT:
        raise ValueError(
            f"{path}: JPEG holds 64 KB of texts, and the comment takes {len(exif)} bytes; write PNG or WebP"
        )
    with replacing(expanded(path)) as unfinished:
        _plain(image).save(unfinished, format="JPEG", quality=round(quality), subsampling="4:4:4", exif=exif)


def save_webp(
    images: Sequence[Image.Image],
    path: Path | str,
    *,
    fps: float | None = None,
    quality: float = 95,
    comment: str | None = None,
    parameters: str | None = None,
) -> None:
    """Write one image, or the frames of an animation that repeats, to the file `path` as WebP.

    Args:
        images: of one size; at least one. Transparency is kept.
        path: the file, in a folder that exists.
        fps: frames per second, for several images.
        quality: 1 to 100; 100 is lossless.
        comment, parameters: texts, see `save_jpeg`.

    Raises:
        TypeError: an entry is no PIL image.
        ValueError: no images, several sizes, several images without `fps`, or a number out of range.
        OSError: the folder does not exist or cannot be written.
    """
    frames = _frames(images)
    check_number("quality", quality, least=1, most=100)
    options: dict[str, Any] = {"lossless": True} if quality == 100 else {"quality": round(quality)}
    if len(frames) > 1:
        if fps is None:
            raise ValueError(f"{len(frames)} frames without fps; expected the number of frames per second")
        options |= {
            "save_all": True,
            "append_images": frames[1:],
            "loop": 0,
            "duration": _durations(len(frames), fps, 1),
        }
    with replacing(expanded(path)) as unfinished:
        frames[0].save(unfinished, format="WEBP", exif=_exif(comment, parameters), **options)


def save_gif(images: Sequence[Image.Image], path: Path | str, *, fps: float, comment: str | None = None) -> None:
    """Write frames to the file `path` as a GIF animation that repeats, in 256 colours each.

    GIF counts time in hundredths of a second: frames are shown for 60 or 70 ms at 15 per second, and no frame is late
    by more than 5 ms.

    Args:
        images: of one size; at least one.
        path: the file, in a folder that exists.
        fps: frames per second, above 0 and at most 50, the fastest that browsers show.
        comment: text of the program.

    Raises:
        TypeError: an entry is no PIL image.
        ValueError: no images, several sizes, or a frame rate out of range.
        OSError: the folder does not exist or cannot be written.
    """
    frames = [to_rgb(frame) for frame in _frames(images)]
    check_number("fps", fps, least=0.01, most=50)
    options: dict[str, Any] = {} if comment is None else {"comment": comment.encode()}
    with replacing(expanded(path)) as unfinished:
        frames[0].save(
            unfinished,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            loop=0,
            duration=_durations(len(frames), fps, 10),
            **options,
        )


def read_image_comment(path: Path | str) -> str | None:
    """Return the comment that `save_jpeg`, `save_webp` or `save_gif` stored in a file, or None without one.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: the file cannot be read as an image.
    """
    with opened_image(existing_file(path, "image"), str(path)) as image:
        comment = image.info.get("comment") if image.format == "GIF" else image.getexif().get(_XP_COMMENT)
    if not comment:
        return None
    content = bytes(comment)
    return content.decode("utf-8" if image.format == "GIF" else "utf-16-le", "replace").rstrip("\0")


def _exif(comment: str | None, parameters: str | None) -> bytes:
    exif = Image.Exif()
    if comment is not None:
        exif[_XP_COMMENT] = comment.encode("utf-16-le") + b"\0\0"
    if parameters is not None:
        exif.get_ifd(_EXIF)[_USER_COMMENT] = _UNICODE + parameters.encode("utf-16-be")
    return exif.tobytes() if comment is not None or parameters is not None else b""


def _frames(images: Sequence[Image.Image]) -> list[Image.Image]:
    frames = list(images)
    for frame in frames:
        _check(frame)
    if not frames:
        raise ValueError("0 frames; expected at least one")
    if len(sizes := dict.fromkeys(frame.size for frame in frames)) > 1:
        raise ValueError(f"frames of the sizes {', '.join(map(str, sizes))}; expected one size")
    return frames


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Return the milliseconds of each of `count` frames, multiples of `unit`, whose sums are nearest to the times."""
    check_number("fps", fps, least=0.01)
    ends = [round(index * 1000 / fps / unit) * unit for index in range(count + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _check(image: Image.Image) -> None:
    if not isinstance(image, Image.Image):
        raise TypeError(f"image={shown(image)}: expected a PIL image")


def _plain(image: Image.Image) -> Image.Image:
    return image if image.mode in ("L", "RGB") else to_rgb(image)
