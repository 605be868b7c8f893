"""Colour code points of ITU-T H.273 (primaries, transfer, range) that image files state, and their conversion to sRGB.

PNG has them in its cICP chunk, AVIF and HEIF in the nclx form of the colr box, and colour profiles (ICC 4.4) in the
cicp tag. Pillow reads none of them. `hdr` converts those of HDR.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ImageFile

from diffsynth.terminal import module_logger

logger = module_logger(__name__)

BT709 = 1
BT2020 = 9

_D65 = (0.3127, 0.3290)
_CHROMATICITIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    5: ((0.640, 0.330), (0.290, 0.600), (0.150, 0.060)),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077)),
}
"""ColourPrimaries of H.273 with the white point D65 -> (x, y) of red, green and blue."""

_UNSPECIFIED = 2
_POWERS = {5: 2.8, 8: 1.0}
_AS_SRGB = (1, _UNSPECIFIED, 4, 6, 7, 11, 13, 14, 15)
"""TransferCharacteristics of SDR that are read with the curve of sRGB: of cameras and displays that are alike it."""

_HDR: dict[int, Literal["pq", "hlg"]] = {16: "pq", 18: "hlg"}

_BOX_LIMIT = 1 << 20
"""Number of bytes of the meta box of an AVIF file that are read at most."""

_CHUNK_LIMIT = 1000
"""Number of chunks, boxes or items of a file that are looked at."""


class CodePoints(NamedTuple):
    """Numbers of ITU-T H.273 that say which colour a level is.

    Args:
        primaries: ColourPrimaries, such as 1 (BT.709, sRGB), 9 (BT.2020) and 12 (Display P3).
        transfer: TransferCharacteristics, such as 13 (sRGB), 16 (PQ) and 18 (HLG).
        is_full: whether the levels use the full range, 0 to 255; else 16 to 235.
    """

    primaries: int
    transfer: int
    is_full: bool = True

    @property
    def hdr(self) -> Literal["pq", "hlg"] | None:
        """Transfer of HDR: "pq", "hlg" or, of SDR, None."""
        return _HDR.get(self.transfer)


def note_code_points(image: ImageFile.ImageFile) -> None:
    """Store the `CodePoints` that a PNG, AVIF or HEIF file states as "cicp" in `image.info`; nothing without them.

    Args:
        image: as PIL opened it, from a file that is still there.
    """
    if "cicp" in image.info or image.format not in ("PNG", "AVIF", "HEIF"):
        return
    try:
        if image.fp is not None:
            place = image.fp.tell()
            try:
                found = _stated(image.fp, image.format)
            finally:
                image.fp.seek(place)
        elif image.filename:
            with Path(image.filename).open("rb") as file:
                found = _stated(file, image.format)
        else:
            return
    except (OSError, ValueError, struct.error):  # a closed or damaged file: PIL says so when it decodes the pixels
        return
    # A colour profile rules over nclx (ISO/IEC 23008-12), the cICP chunk over a colour profile (PNG).
    if found is not None and (image.format == "PNG" or "icc_profile" not in image.info):
        image.info["cicp"] = found


def code_points_of_profile(profile: bytes) -> CodePoints | None:
    """Return the `CodePoints` in the cicp tag of a colour profile (ICC.1:2022, 9.2.17); None without one."""
    count = int.from_bytes(profile[128:132])
    for index in range(min(count, 100)):
        signature, offset, size = struct.unpack(">4sII", profile[132 + 12 * index : 144 + 12 * index].ljust(12, b"\0"))
        if signature == b"cicp" and size >= 12 and len(profile) >= offset + 12:
            return _points(*profile[offset + 8 : offset + 10], profile[offset + 11])
    return None


def sdr_to_srgb(levels: UInt8[np.ndarray, "h w 3"], points: CodePoints) -> UInt8[np.ndarray, "h w 3"]:
    """Return 8-bit RGB of SDR code points in sRGB: relative colorimetric, colours outside of sRGB clipped.

    Primaries and transfers that are not in the tables of this module are taken as those of sRGB, with a warning.
    """
    if points.transfer not in _AS_SRGB and points.transfer not in _POWERS:
        logger.warning("an image has transfer characteristics %d of H.273; it is taken as sRGB", points.transfer)
    if points.primaries not in _CHROMATICITIES and points.primaries != _UNSPECIFIED:
        logger.warning("an image has colour primaries %d of H.273; they are taken as those of sRGB", points.primaries)
    matrix = matrix_between(points.primaries, BT709)
    if matrix is None and points.is_full and points.transfer not in _POWERS:
        return levels
    signal = full_range(np.arange(256, dtype=np.uint8), points)
    power = _POWERS.get(points.transfer)
    light = (srgb_decoded(signal) if power is None else signal**power).astype(np.float32)[levels]
    linear = light if matrix is None else light @ matrix.T
    return np.rint(srgb_encoded(linear.clip(0, 1)) * 255).astype(np.uint8)


def full_range(levels: UInt8[np.ndarray, "*n"], points: CodePoints) -> Float[np.ndarray, "*n"]:
    """Return 8-bit levels as a float32 signal in [0, 1]: 0 to 255 at full range, else 16 to 235, clipped."""
    values = levels.astype(np.float32)
    return values / 255 if points.is_full else ((values - 16) / 219).clip(0, 1)


@functools.cache
def matrix_between(source: int, target: int) -> Float[np.ndarray, "3 3"] | None:
    """Return the float32 matrix from linear RGB of ColourPrimaries `source` to those of `target`; None where they are
    the same, or `source` is unspecified or unknown.
    """
    if source == target or source not in _CHROMATICITIES:
        return None
    return (np.linalg.inv(_to_xyz(target)) @ _to_xyz(source)).astype(np.float32)


def srgb_encoded(light: np.ndarray) -> np.ndarray:
    """Return linear light in [0, 1] in the encoding of sRGB (IEC 61966-2-1), in [0, 1], of the same shape and dtype."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def srgb_decoded(signal: np.ndarray) -> np.ndarray:
    """Return the linear light, in [0, 1], of a signal of sRGB in [0, 1], of the same shape and dtype."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _to_xyz(primaries: int) -> Float[np.ndarray, "3 3"]:
    """Return the matrix from linear RGB to XYZ in which RGB (1, 1, 1) is D65 (SMPTE RP 177)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in _CHROMATICITIES[primaries]]).T
    x, y = _D65
    return columns * np.linalg.solve(columns, (x / y, 1, (1 - x - y) / y))


def _points(primaries: int, transfer: int, is_full: int) -> CodePoints:
    return CodePoints(primaries, transfer, bool(is_full))


def _stated(file: BinaryIO, kind: str) -> CodePoints | None:
    file.seek(0)
    return _of_png(file) if kind == "PNG" else _of_boxes(file)


def _of_png(file: BinaryIO) -> CodePoints | None:
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return None
    for _ in range(_CHUNK_LIMIT):
        size, name = struct.unpack(">I4s", file.read(8))
        if name == b"cICP" and size == 4:
            primaries, transfer, _, is_full = file.read(4)
            return _points(primaries, transfer, is_full)
        if name in (b"IDAT", b"IEND"):
            return None
        file.seek(size + 4, 1)
    return None


def _of_boxes(file: BinaryIO) -> CodePoints | None:
    """Return the code points of the colr boxes of the primary item of an AVIF or HEIF file (ISO/IEC 23008-12)."""
    for _ in range(_CHUNK_LIMIT):
        size, name = struct.unpack(">I4s", file.read(8))
        if size == 1:
            size = int.from_bytes(file.read(8)) - 8
        if name == b"meta":
            return _of_meta(file.read(min(size - 8, _BOX_LIMIT)))
        if size < 8:
            return None
        file.seek(size - 8, 1)
    return None


def _of_meta(meta: bytes) -> CodePoints | None:
    boxes = dict(_children(meta[4:]))
    properties = dict(_children(boxes.get(b"iprp", b"")))
    listed = _children(properties.get(b"ipco", b""))
    wanted = _associated(properties.get(b"ipma", b""), boxes.get(b"pitm", b""))
    for index, (name, content) in enumerate(listed, start=1):
        if name == b"colr" and content[:4] == b"nclx" and len(content) >= 11 and index in wanted:
            primaries, transfer = struct.unpack(">HH", content[4:8])
            return _points(primaries, transfer, 1)  # decoders convert YCbCr to RGB of full range
    return None


def _children(content: bytes) -> list[tuple[bytes, bytes]]:
    """Return (name, content) of each box in `content`, up to the first damaged one."""
    found, place = [], 0
    while place + 8 <= len(content) and len(found) < _CHUNK_LIMIT:
        size = int.from_bytes(content[place : place + 4])
        if size < 8:
            break
        found.append((content[place + 4 : place + 8], content[place + 8 : place + size]))
        place += size
    return found


def _associated(ipma: bytes, pitm: bytes) -> set[int]:
    """Return the set of the indices, from 1, of the properties of the primary item; empty if the boxes are damaged."""
    if len(ipma) < 8 or len(pitm) < 6:
        return set()
    primary = int.from_bytes(pitm[4:6] if pitm[0] == 0 else pitm[4:8])
    id_size, index_size = (2 if ipma[0] == 0 else 4), (2 if ipma[3] & 1 else 1)
    mask = 0x7FFF if index_size == 2 else 0x7F  # the highest bit marks a property as essential
    place = 8
    for _ in range(min(int.from_bytes(ipma[4:8]), _CHUNK_LIMIT)):
        item = int.from_bytes(ipma[place : place + id_size])
        count = int.from_bytes(ipma[place + id_size : place + id_size + 1])
        start = place + id_size + 1
        place = start + count * index_size
        if item == primary:
            steps = range(start, place, index_size)
            return {int.from_bytes(ipma[step : step + index_size]) & mask for step in steps}
    return set()
