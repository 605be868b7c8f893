"""Colours that image files state by numbers (cICP chunk, nclx, cicp tag of a profile), and HDR images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data.animation import Animation
from diffsynth.core.data.code_points import (
    CodePoints,
    code_points_of_profile,
    full_range,
    matrix_between,
    note_code_points,
    sdr_to_srgb,
)
from diffsynth.core.data.color import to_mask, to_rgb
from diffsynth.core.data.image import read_image

P3_TO_SRGB = np.array([[1.2249401, -0.2249404, 0], [-0.0420569, 1.0420571, 0], [-0.0196376, -0.0786361, 1.0982735]])
"""Linear Display P3 to linear sRGB, as published with CSS Color 4."""


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(image: Image.Image, *points: int, **settings) -> bytes:
    """Return a PNG file with the cICP chunk (primaries, transfer, matrix, full range) after its header."""
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    data = file.getvalue()
    return data[:33] + chunk(b"cICP", bytes(points)) + data[33:]


def avif(image: Image.Image, primaries: int, transfer: int, **settings) -> bytes:
    """Return an AVIF file whose nclx box has other numbers than Pillow's encoder gave it."""
    file = io.BytesIO()
    image.save(file, "AVIF", quality=100, subsampling="4:4:4", **settings)
    data = file.getvalue()
    assert data.count(b"nclx") >= 1
    start = data.index(b"nclx") + 4
    return data[:start] + struct.pack(">HH", primaries, transfer) + data[start + 4 :]


def profile(primaries: int, transfer: int) -> bytes:
    """Return the header, the table and the cicp tag of a colour profile."""
    tag = b"cicp\0\0\0\0" + bytes([primaries, transfer, 0, 1])
    return bytes(128) + struct.pack(">I4sII", 1, b"cicp", 144, len(tag)) + tag


def steps(white: int, half: int = 128) -> Image.Image:
    """Return an image of black, half signal and white."""
    levels = np.zeros((8, 24, 3), np.uint8)
    levels[:, 8:16], levels[:, 16:] = half, white
    return Image.fromarray(levels)


def greys(image: Image.Image) -> list[int]:
    return [round(float(np.asarray(image)[4, x].mean())) for x in (4, 12, 20)]


@pytest.mark.parametrize("kind", ["png", "grey png", "apng", "avif", "jpeg with a profile"])
@pytest.mark.parametrize(("transfer", "white", "half"), [(16, 192, 127), (18, 255, 100)])
def test_hdr_is_tone_mapped(tmp_path, kind, transfer, white, half):
    """HDR screenshots came out grey and flat: a signal of 50% is 127 (PQ) or 100 (HLG) by ITU-R BT.2446, method A."""
    image = steps(white)
    path = tmp_path / "a.bin"
    if kind == "avif":
        path.write_bytes(avif(image, 9, transfer))
    elif kind.startswith("jpeg"):
        image.save(path, "JPEG", quality=100, icc_profile=profile(9, transfer))
    elif kind == "apng":
        path.write_bytes(png(image, 9, transfer, 0, 1, save_all=True, append_images=[steps(white, 0)]))
        frames = [frame for _, _, frame in Animation(path).frames()]
        assert [greys(frame)[1] <= 2 for frame in frames] == [False, True]
    else:
        path.write_bytes(png(image.convert("L") if kind == "grey png" else image, 9, transfer, 0, 1))
    kept = read_image(path, None)
    for read in (read_image(path), to_rgb(kept), to_rgb(to_rgb(kept)), to_rgb(Image.open(path)), to_rgb(loaded(path))):
        black, grey, bright = greys(read)
        assert black <= 2
        assert abs(grey - half) <= 3
        assert bright >= 252
        assert read.mode == "RGB"
    assert abs(greys(to_mask(kept))[1] - 128) <= 2


def loaded(path) -> Image.Image:
    image = Image.open(path)
    image.load()
    return image


def test_saturated_hdr_of_display_p3_is_brought_to_bt2020():
    """A grey is the same for all primaries with one white; a saturated green is not."""
    colors = Image.fromarray(np.array([[[150, 150, 150], [20, 150, 20]]], np.uint8))
    wide, p3 = (np.asarray(read_bytes(png(colors, primaries, 16, 0, 1))).astype(int)[0] for primaries in (9, 12))
    assert np.abs(wide[0] - p3[0]).max() <= 1
    assert p3[1][1] <= wide[1][1]
    assert np.abs(wide[1] - p3[1]).max() > 3


def read_bytes(data: bytes) -> Image.Image:
    return to_rgb(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("is_full", [True, False])
def test_display_p3(is_full):
    levels = np.random.default_rng(0).integers(16, 236, (8, 8, 3), dtype=np.uint8)
    signal = levels / 255 if is_full else (levels - 16.0) / 219
    light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4) @ P3_TO_SRGB.T
    light = light.clip(0, 1)
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    found = np.asarray(read_bytes(png(Image.fromarray(levels), 12, 13, 0, int(is_full))))
    assert np.abs(found - expected).max() <= 1.01


def test_code_points_rule_over_a_profile_in_png_and_a_profile_over_those_of_avif(tmp_path):
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert greys(read_bytes(png(steps(192), 9, 16, 0, 1, icc_profile=srgb)))[2] >= 252
    assert abs(greys(read_bytes(avif(steps(192), 9, 16, icc_profile=srgb)))[2] - 192) <= 2


@pytest.mark.parametrize("points", [(1, 13, 0, 1), (2, 2, 0, 1), (1, 1, 0, 1), (1, 4, 0, 1)])
def test_those_of_srgb_change_nothing(points):
    image = steps(200)
    assert np.array_equal(np.asarray(read_bytes(png(image, *points))), np.asarray(image))


@pytest.mark.parametrize(("points", "message"), [((1, 12), "transfer characteristics 12"), ((8, 13), "primaries 8")])
def test_unknown_ones_are_told(caplog, points, message):
    levels = np.full((1, 1, 3), 7, np.uint8)
    assert sdr_to_srgb(levels, CodePoints(*points)) is levels
    assert message in caplog.text


def test_linear_light():
    (found,) = np.unique(np.asarray(read_bytes(png(Image.new("RGB", (1, 1), (55, 55, 55)), 1, 8, 0, 1))))
    assert found == 128  # 0.2157 in linear light


def test_a_gain_map_is_no_frame_and_changes_nothing(tmp_path):
    """An Ultra HDR photograph is an SDR JPEG followed by a map that brightens it: the SDR image is what is meant."""
    image, gains = steps(200), Image.new("L", (12, 4), 250)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[gains], quality=95)
    image.save(tmp_path / "b.jpg", "JPEG", quality=95)
    found = read_image(tmp_path / "a.jpg")
    assert found.size == image.size
    assert np.array_equal(np.asarray(found), np.asarray(read_image(tmp_path / "b.jpg")))


def test_matrices():
    assert matrix_between(12, 1) == pytest.approx(P3_TO_SRGB, abs=2e-4)
    assert matrix_between(1, 1) is None
    assert matrix_between(3, 1) is None
    assert full_range(np.array([0, 16, 235], np.uint8), CodePoints(1, 13, False)).tolist() == [0, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_damaged_files_state_nothing_or_something(seed):
    """Whatever the boxes and chunks say, reading them ends, and says no more than that there is nothing."""
    rng = np.random.default_rng(seed)
    for data in (avif(steps(192), 9, 16), png(steps(192), 9, 16, 0, 1)):
        damaged = bytearray(data)
        for place in rng.integers(12, 300, 8):
            damaged[place % len(damaged)] = rng.integers(256)
        image = Image.open(io.BytesIO(data))
        image.fp = io.BytesIO(bytes(damaged[: rng.integers(20, len(damaged))]))
        note_code_points(image)
    assert code_points_of_profile(bytes(damaged)) is None
    assert code_points_of_profile(b"") is None
    assert code_points_of_profile(profile(9, 16)) == (9, 16, True)
