"""Conversion of decoded video frames to RGB images, as the tags of the file say, and of images to frames to encode."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from diffsynth.core.data.code_points import BT2020, CodePoints
from diffsynth.core.data.color import WHITE, Color, by_code_points, to_rgb
from diffsynth.core.data.hdr import sdr_from_hdr
from diffsynth.errors import Refused

# Values of AVColorSpace, AVColorRange, AVColorPrimaries and AVColorTransferCharacteristic of FFmpeg (ITU-T H.273).
_BT709, _UNSPECIFIED, _RESERVED, _SMPTE170M = 1, 2, 3, 6
_LIMITED = 1
_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
_REFUSED_MATRICES = {14: "ICtCp", 15: "IPT-C2 (Dolby Vision profile 5)", 16: "YCgCo-R", 17: "YCgCo-R"}
_WIDE = (BT2020, 12)
"""Primaries of SDR video that are converted to sRGB; those of BT.601 are close to it, and often tagged wrongly."""

_HD_LINES = 720
"""Height in pixels from which video is encoded with BT.709 and, if untagged, read as such; below, it is BT.601."""

_TURNS = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Signs of the display matrix (a, b, c, d), which maps (x, y) to (a x + c y, b x + d y) -> what PIL does for it."""


def image_of(
    frame: Any,
    *,
    transfer: int,
    primaries: int = _UNSPECIFIED,
    pixel_aspect: Fraction | None = None,
    background: Color = WHITE,
) -> Image.Image:
    """Return a decoded frame as an RGB image in sRGB, upright, with square pixels.

    Colours are converted by the matrix and the range that the file states; without them by BT.709 from 720 lines, else
    BT.601. HDR is tone-mapped to SDR, see `hdr.sdr_from_hdr`; SDR with the primaries of BT.2020 or Display P3 is
    converted to sRGB. The display matrix turns and mirrors.

    Args:
        frame: a `VideoFrame` of PyAV.
        transfer: transfer characteristic of the stream, a number of ITU-T H.273.
        primaries: colour primaries of the stream, a number of ITU-T H.273.
        pixel_aspect: width of a pixel divided by its height; None is 1.
        background: colour below transparent pixels.

    Raises:
        Refused: colours of a kind that is not supported, or a display matrix that is not a multiple of a quarter turn.
    """
    is_rgb = frame.format.is_rgb or frame.format.has_palette
    matrix = {} if is_rgb else {"src_colorspace": _matrix(frame)}
    points = CodePoints(primaries, transfer)
    if points.hdr:
        if not is_rgb and frame.colorspace in (_UNSPECIFIED, _RESERVED):
            matrix = {"src_colorspace": "BT2020"}
        signal = frame.to_ndarray(format="rgb48le", **matrix).astype(np.float32) / 65535
        image = Image.fromarray(sdr_from_hdr(signal, points.hdr, primaries))
    elif frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba", **matrix)), background=background)
    else:
        image = frame.to_image(**matrix)
        image = by_code_points(image, points) if primaries in _WIDE else image
    return _turned(_square(image, pixel_aspect), frame)


def encoded_tags(context: Any, lines: int) -> dict[str, str]:
    """Set the colour tags of an encoder (matrix, range, primaries, transfer) for a height in lines; return the
    arguments for `VideoFrame.reformat` that convert a frame to them.

    Args:
        context: codec context of PyAV.
        lines: height of the video in pixels.
    """
    is_hd = lines >= _HD_LINES
    context.colorspace = _BT709 if is_hd else _SMPTE170M
    context.color_range = _LIMITED
    context.color_primaries = context.color_trc = _BT709
    return {"dst_colorspace": "ITU709" if is_hd else "ITU601", "dst_color_range": "MPEG"}


def _matrix(frame: Any) -> str:
    stated = int(frame.colorspace)
    if stated in _REFUSED_MATRICES:
        raise Refused(f"video in {_REFUSED_MATRICES[stated]} is not supported; convert it to BT.709 SDR")
    return _MATRICES.get(stated, "ITU709" if frame.height >= _HD_LINES else "ITU601")


def _square(image: Image.Image, ratio: Fraction | None) -> Image.Image:
    """Return the image scaled in width so that its pixels are square, if the video states that they are not."""
    if not ratio or ratio == 1 or not 0.1 < ratio < 10:
        return image
    return image.resize((max(round(image.width * ratio), 1), image.height), Image.Resampling.BICUBIC)


def _turned(image: Image.Image, frame: Any) -> Image.Image:
    a, b, c, d = _display_matrix(frame)
    size = max(abs(a), abs(b), abs(c), abs(d)) or 1
    parts = [value / size for value in (a, b, c, d)]
    signs = tuple(round(part) for part in parts)
    if signs not in _TURNS or max(abs(part - round(part)) for part in parts) > 0.02:
        raise Refused(f"video is turned by {frame.rotation} degrees; only multiples of 90 degrees are supported")
    method = _TURNS[signs]
    return image if method is None else image.transpose(method)


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """Return the four numbers of `_TURNS` of a frame, not normalized; those of no turn if the file has none."""
    try:
        stored = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    except ValueError:  # PyAV lists no side data if it does not know the type of one; this has the angle only
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if stored is None:
        return 1, 0, 0, 1
    values = struct.unpack("=9i", bytes(stored)[:36])
    return values[0], values[1], values[3], values[4]
