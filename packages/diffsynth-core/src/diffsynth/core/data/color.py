"""Conversion of PIL images of every mode and colour space to 8-bit sRGB, with transparency and orientation.

All images pass here, those that are read from files and those that callers pass. 8-bit RGB images without a colour
profile, another gamma or transparency are returned unchanged.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps

from diffsynth.core.data.code_points import (
    CodePoints,
    code_points_of_profile,
    full_range,
    note_code_points,
    sdr_to_srgb,
    srgb_encoded,
)
from diffsynth.core.data.hdr import sdr_from_hdr
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

Color = str | tuple[int, int, int]
"""A name or a hexadecimal text that PIL knows, "white" or "#ff8000", or a tuple (red, green, blue) of 0 to 255."""

WHITE: Color = (255, 255, 255)

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_SRGB_GAMMA = 1 / 2.2
_PROFILE_OF_MODE = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}
_STRIP = 1 << 20
"""Number of pixels that are tone-mapped at a time; one takes about 150 bytes then."""

_CONVERTED = ("icc_profile", "cicp", "gamma", "srgb", "chromaticity", "transparency")
"""Keys of `Image.info` that describe pixels before the conversion."""


def to_rgb(image: Image.Image, *, background: Color = WHITE) -> Image.Image:
    """Return an image of any mode as mode "RGB" in sRGB, upright, with transparent pixels over `background`.

    * Grey levels of 16 bits are divided by 65535 (those of 12-bit TIFF files by 4095). Floating-point levels are in
      [0, 1], or in [0, 255] if one of them is above 1.
    * A colour profile (ICC) in the image's info is converted to sRGB, relative colorimetric with black point
      compensation; one that changes no level by more than 2 leaves all levels as they are. Without a profile, the gamma
      that a PNG file states is converted.
    * Code points (`code_points`) rule over a profile in a PNG file, and without a profile in AVIF. HDR (PQ, HLG) is
      tone-mapped to SDR as in `hdr.sdr_from_hdr`.
    * The EXIF orientation is applied to images as PIL opened them. An image that a program has changed since, by
      `convert` or `rotate`, may be upright already: its orientation is ignored, with a warning.

    Args:
        image: the image; it is not changed. It is returned itself if it is of mode RGB and nothing is to be converted.
        background: colour below transparent pixels.

    Raises:
        ValueError: an image without pixels, grey levels of an unknown range, an unknown colour, or an image file that
            is closed or damaged.
    """
    color, alpha = _color_and_alpha(_loaded(image))
    if alpha is None:
        return color
    canvas = Image.new("RGB", color.size, rgb_of(background))
    canvas.paste(color, mask=alpha)
    return canvas


def to_rgba(image: Image.Image) -> Image.Image:
    """Return an image of any mode as mode "RGBA" in sRGB, upright; colours as in `to_rgb`, alpha not premultiplied.

    Raises:
        ValueError: see `to_rgb`.
    """
    color, alpha = _color_and_alpha(_loaded(image))
    result = color.copy()
    result.putalpha(255 if alpha is None else alpha)
    return result


def to_mask(image: Image.Image) -> Image.Image:
    """Return a mask as mode "L", upright: the alpha channel of an image with transparency, where opaque is 255; else
    the brightness, 16 bits and floats scaled as in `to_rgb`. Colour profiles are not applied.

    Raises:
        ValueError: see `to_rgb`.
    """
    image = _loaded(image)
    alpha = _alpha(image)
    return _eight_bits(image).convert("L") if alpha is None else alpha


def upright(image: Image.Image) -> Image.Image:
    """Return the image turned and mirrored as its EXIF orientation says, without this tag; `image` itself if it has no
    orientation or one that cannot be read.
    """
    image.load()  # PIL's TIFF reader turns images and removes the tag then
    orientation = _orientation(image)
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) in pixels that `upright` will give an image whose pixels are not decoded."""
    width, height = image.size
    is_turned = getattr(image, "format", None) != "TIFF" and _orientation(image) >= 5  # PIL has turned those of TIFF
    return (height, width) if is_turned else (width, height)


def rgb_of(color: Color) -> tuple[int, int, int]:
    """Return a colour as (red, green, blue), 0 to 255.

    Raises:
        ValueError: not a colour.
    """
    try:
        levels = ImageColor.getrgb(color) if isinstance(color, str) else tuple(color)
    except (ValueError, TypeError):
        levels = ()
    if len(levels) != 3 or not all(isinstance(level, int) and 0 <= level <= 255 for level in levels):
        raise ValueError(f"background={color!r}: expected a colour such as 'white', '#ff8000' or (255, 128, 0)")
    red, green, blue = levels
    return red, green, blue


def check_levels(image: Image.Image) -> None:
    """Raise ValueError if an image whose pixels are decoded has grey levels of an unknown range; see `to_rgb`."""
    if image.mode in ("I", "F"):
        _grey_levels(image)


def _loaded(image: Image.Image) -> Image.Image:
    """Return the image with its pixels decoded and, if PIL opened it from a file, upright."""
    if not image.width or not image.height:
        raise ValueError(f"an image of {image.width}x{image.height} has no pixels")
    if isinstance(image, ImageFile.ImageFile):
        note_code_points(image)
    try:
        image.load()
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        name = getattr(image, "filename", "") or "an image"
        raise ValueError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from error
    if isinstance(image, ImageFile.ImageFile):
        return upright(image)
    if (orientation := _orientation(image)) != 1:
        logger.warning(
            "an image has EXIF orientation %d, which is ignored because the image is not as it was opened; "
            "call PIL.ImageOps.exif_transpose on the opened image",
            orientation,
        )
    return image


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # EXIF data are written by many programs, and are often damaged in sound images
        logger.warning("an image has EXIF data that cannot be read (%s); it is taken as upright", error)
        return 1
    return orientation if orientation in range(1, 9) else 1


def _color_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return (image of mode RGB in sRGB, its alpha channel of mode L, or None if it is opaque)."""
    alpha = _alpha(image)
    info = image.info
    levels = _eight_bits(image)
    color = _to_srgb(levels, info)
    if color is not image and any(key in color.info for key in _CONVERTED):
        color = color.copy() if color is levels else color
        color.info = {key: value for key, value in color.info.items() if key not in _CONVERTED}
    return color, alpha


def _alpha(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of an image as mode L, or None if the image is opaque."""
    if not image.has_transparency_data:
        return None
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        alpha = Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA"):
        alpha = image.getchannel("A")
    elif image.mode == "La":
        alpha = image.convert("LA").getchannel("A")
    else:
        if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
            # PIL keeps the high byte of 16-bit colours, but not of the transparent one among them.
            image = image.copy()
            image.info["transparency"] = tuple(level >> 8 for level in key)
        alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image without alpha in a mode of 8 bits a channel: L, RGB, CMYK, LAB, or another that converts to
    RGB.
    """
    mode = image.mode
    if mode in ("L", "RGB", "CMYK", "LAB", "HSV", "YCbCr"):
        return image
    if mode.startswith("I") or mode == "F":
        return _grey_levels(image)
    if mode in ("1", "LA"):
        return image.convert("L")
    if mode == "La":
        return image.convert("LA").convert("L")
    if mode == "RGBa":
        return image.convert("RGBA").convert("RGB")
    if mode in ("P", "PA"):  # without alpha: the colours of transparent entries are dropped by the caller's mask
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey_levels(image: Image.Image) -> Image.Image:
    """Return an image of mode I, I;16 or F as mode L."""
    values = np.asarray(image)
    if image.mode == "F":
        return _copied_info(image, _float_levels(values))
    top = 65535
    if image.mode == "I":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > top:
            raise ValueError(f"an image of mode I has levels from {low} to {high}; expected 0 to {top}, as of 16 bits")
        if 0 < high <= 255 and getattr(image, "format", None) is None:
            raise ValueError(
                f"an image of mode I has levels up to {high}, of 8 bits or of 16; convert it to mode 'L' or 'I;16'"
            )
    elif _bits(image) == 12:
        top = 4095
    table = ((np.arange(65536, dtype=np.uint32).clip(max=top) * 255 + top // 2) // top).astype(np.uint8)
    return _copied_info(image, table[values])


def _float_levels(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    scale = 255.0 if high <= 1 else 1.0
    if not (low * scale >= -1 and high * scale <= 256):  # also refuses NaN
        raise ValueError(
            f"an image of floating-point grey has levels from {low:g} to {high:g}; expected 0 to 1, or 0 to 255"
        )
    return np.rint((values * scale).clip(0, 255)).astype(np.uint8)


def _bits(image: Image.Image) -> int:
    """Return the bits of a grey level of an image that PIL opened from a TIFF file, 16 for other images."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    return int(bits[0] if isinstance(bits, tuple) else bits)


def _copied_info(image: Image.Image, levels: np.ndarray) -> Image.Image:
    result = Image.fromarray(levels)
    result.info = dict(image.info)
    return result


def _to_srgb(image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """Return an image of 8 bits a channel as mode RGB in sRGB, by the code points, the profile or the gamma in
    `info`.
    """
    if image.mode in ("HSV", "YCbCr"):
        image = image.convert("RGB")
    if isinstance(points := info.get("cicp"), CodePoints):
        return by_code_points(image.convert("RGB"), points)
    profile = info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        stated = code_points_of_profile(profile)
        if stated is not None and stated.hdr:  # the curves of such a profile are those of HDR, without tone mapping
            return by_code_points(image.convert("RGB"), stated)
        transform = _transform(profile, image.mode)
        if transform is not None:
            return transform.apply(image)
    elif "srgb" not in info:
        image = _without_gamma(image, info.get("gamma"))
    return image if image.mode == "RGB" else image.convert("RGB")


def by_code_points(image: Image.Image, points: CodePoints) -> Image.Image:
    """Return an RGB image of the `CodePoints` given as an RGB image in sRGB, HDR tone-mapped; `image` itself if its
    levels are those of sRGB.
    """
    levels = np.asarray(image)
    rows = max(_STRIP // image.width, 1)
    strips = [levels[top : top + rows] for top in range(0, image.height, rows)]
    if points.hdr:
        done = [sdr_from_hdr(full_range(strip, points), points.hdr, points.primaries) for strip in strips]
    else:
        done = [sdr_to_srgb(strip, points) for strip in strips]
    if all(after is before for after, before in zip(done, strips, strict=True)):
        return image
    return _copied_info(image, np.concatenate(done))


def _without_gamma(image: Image.Image, gamma: Any) -> Image.Image:
    """Return an image of mode L or RGB whose levels are `light ** gamma`, as PNG files state it, in sRGB's encoding."""
    if not isinstance(gamma, float) or not 0.05 < gamma < 20 or abs(gamma - _SRGB_GAMMA) < 0.01:
        return image
    if image.mode not in ("L", "RGB"):
        return image
    light = (np.arange(256) / 255) ** (1 / gamma)
    table = np.rint(255 * srgb_encoded(light)).astype(int).tolist()
    return image.point(table * len(image.getbands()))


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if it changes no level by more than 2, cannot be read, or is
    not of the image's mode.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != _PROFILE_OF_MODE.get(mode):
            logger.warning("an image of mode %s has a colour profile for %s, which is ignored", mode, space)
            return None
        # Without NOCACHE, a transform keeps its last pixel, and threads must not share it.
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
        if mode not in ("L", "RGB"):
            return transform
        levels = _every_level(mode)
        change = np.asarray(transform.apply(levels), int) - np.asarray(levels.convert("RGB"), int)
        return None if np.abs(change).max() <= 2 else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        logger.warning("an image has a colour profile that cannot be used (%s); it is taken as sRGB", error)
        return None


def _every_level(mode: str) -> Image.Image:
    """Return an image of mode L with all levels, or of mode RGB with all combinations of 16 levels a channel."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)
    return Image.fromarray(grid.reshape(64, 64, 3))
