"""Images of every mode become the levels that their files mean, and plain images keep every bit."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from color_profiles import P3_TO_XYZ, cmyk_profile, grey_profile, matrix_profile
from diffsynth.core.data.color import check_levels, rgb_of, to_mask, to_rgb, to_rgba, upright, upright_size

COLORS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **settings) -> Image.Image:
    """Return the image as PIL opens it after it was saved."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return Image.open(io.BytesIO(file.getvalue()))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def srgb(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] as levels of sRGB (IEC 61966-2-1)."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_plain_images_are_returned_themselves():
    image = Image.fromarray(COLORS)
    assert to_rgb(image) is image
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for settings in ({"icc_profile": profile}, {"pnginfo": chunk(b"gAMA", 45455)}, {"pnginfo": chunk(b"sRGB", 0)}):
        assert np.array_equal(levels(to_rgb(stored(image, **settings))), COLORS)


@pytest.mark.parametrize(
    ("orientation", "lay"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, 1)),  # to be turned clockwise
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation(orientation, lay, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = stored(Image.fromarray(np.ascontiguousarray(lay(COLORS))), kind, exif=exif)
    assert upright_size(image) == (8, 6)
    assert np.array_equal(levels(to_rgb(image)), COLORS)
    assert np.array_equal(levels(upright(upright(image))), COLORS)


def test_an_image_that_a_program_changed_is_not_turned(caplog):
    """A program that turned a photograph by `rotate` keeps its EXIF data, and would see it turned twice."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = stored(Image.fromarray(COLORS), exif=exif).rotate(-90, expand=True)
    assert to_rgb(turned).size == (6, 8)
    assert "EXIF orientation 6, which is ignored" in caplog.text


def test_transparency_is_over_the_background():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [[0, 255, 0, 0], [255, 0, 0, 128], [255, 0, 0, 255]]
    image = Image.fromarray(pixels)
    assert levels(to_rgb(image)).tolist() == [[[255, 255, 255], [255, 127, 127], [255, 0, 0]]]
    assert levels(to_rgb(image, background="#0000ff")).tolist() == [[[0, 0, 255], [128, 0, 127], [255, 0, 0]]]
    assert np.array_equal(levels(to_rgba(image)), pixels)
    assert levels(to_mask(image)).tolist() == [[0, 128, 255]]
    assert levels(to_rgba(Image.fromarray(COLORS)))[..., 3].min() == 255


@pytest.mark.parametrize("mode", ["LA", "P", "1", "PA", "RGBa", "La"])
def test_modes_with_and_without_alpha(mode):
    image = Image.new("L", (2, 1))
    image.putpixel((1, 0), 200)
    alpha = Image.new("L", (2, 1), 255)
    alpha.putpixel((0, 0), 0)
    if mode == "1":
        assert levels(to_rgb(image.convert("1", dither=Image.Dither.NONE)))[..., 0].tolist() == [[0, 255]]
        return
    if mode == "P":
        image = image.convert("RGB").quantize(2)
        image.info["transparency"] = image.getpixel((0, 0))
        image = stored(image)
    else:
        image = Image.merge("LA", (image, alpha))
        image = image.convert("RGBA").convert(mode) if mode != "La" else image.convert("La")
    assert levels(to_rgb(image))[..., 0].tolist() == [[255, 200]]
    assert levels(to_mask(image)).tolist() == [[0, 255]]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour(depth):
    """PNG and GIF may name one colour that is transparent."""
    colour = (10, 20, 30) if depth == 8 else (10 * 257, 20 * 257, 30 * 257)
    data = png(
        2,
        1,
        2,
        depth,
        struct.pack(">6H" if depth == 16 else "6B", *colour, *([0] * 3)),
        tRNS=struct.pack(">3H", *colour),
    )
    assert levels(to_rgb(Image.open(io.BytesIO(data)))).tolist() == [[[255] * 3, [0] * 3]]
    grey = png(2, 1, 0, 16, struct.pack(">2H", 1000, 1001), tRNS=struct.pack(">H", 1000))
    assert levels(to_rgb(Image.open(io.BytesIO(grey))))[..., 0].tolist() == [[255, 4]]


def test_grey_of_16_bits():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(int)
    for image in (stored(Image.fromarray(values)), Image.fromarray(values), stored(Image.fromarray(values), "TIFF")):
        assert np.array_equal(levels(to_rgb(image))[..., 1], expected)
    portable = Image.open(io.BytesIO(b"P5 2 1 65535\n" + struct.pack(">2H", 200, 65535)))
    assert levels(to_rgb(portable))[..., 0].tolist() == [[1, 255]]
    assert levels(to_mask(Image.fromarray(values)))[0, 255] == 1


def test_grey_of_12_bits():
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 3, 1), (279, 4, 3)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    pixels = bytes([0x80, 0x0F, 0xFF])  # 0x800 and 0xFFF
    data = b"II*\0" + struct.pack("<I", 12) + pixels + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert levels(to_rgb(Image.open(io.BytesIO(data))))[..., 0].tolist() == [[128, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.25, 1.0], [0, 64, 255]), ([0.0, 0.25, 255.0], [0, 0, 255]), ([0.5] * 3, [128] * 3)],
)
def test_floating_point(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    for one in (image, stored(image, "TIFF")):
        assert levels(to_rgb(one))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "mode I has levels from 0 to 70000; expected 0 to 65535"),
        (Image.fromarray(np.array([[0, 200]], np.int32)), "levels up to 200, of 8 bits or of 16"),
        (Image.fromarray(np.array([[0, 300]], np.float32)), "levels from 0 to 300; expected 0 to 1, or 0 to 255"),
        (Image.fromarray(np.array([[-1, 1]], np.float32)), "levels from -1 to 1"),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), "levels from nan to nan"),
        (Image.new("RGB", (0, 4)), "an image of 0x4 has no pixels"),
    ],
)
def test_levels_of_an_unknown_range_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)
    if image.mode != "RGB":
        with pytest.raises(ValueError, match=message):
            check_levels(image)


def test_a_closed_and_a_truncated_image(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    for image, message in (
        (closed, "a.png cannot be decoded"),
        (Image.open(tmp_path / "b.png"), "b.png cannot be dec"),
    ):
        with pytest.raises(ValueError, match=message):
            to_rgb(image)


def test_a_profile_is_converted_to_srgb():
    """Photographs of telephones are in Display P3; taken as sRGB, they look pale."""
    gamma = 563 / 256  # as the profile stores 2.2
    image = stored(Image.fromarray(COLORS), icc_profile=matrix_profile(P3_TO_XYZ, gamma))
    to_srgb = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    expected = srgb((COLORS / 255) ** gamma @ P3_TO_XYZ.T @ to_srgb.T)
    converted = to_rgb(image)
    assert np.abs(levels(converted) - expected).max() <= 2
    assert np.abs(levels(converted) - COLORS).max() > 10
    assert to_rgb(converted) is converted


def test_a_profile_of_grey():
    image = stored(Image.fromarray(np.array([[0, 128, 255]], np.uint8)), icc_profile=grey_profile(1.0))
    expected = srgb(np.array([0, 128 / 255, 1]))
    assert np.abs(levels(to_rgb(image))[0, :, 2] - expected).max() <= 2


def test_cmyk_with_and_without_a_profile():
    inks = Image.merge(
        "CMYK", [Image.fromarray(np.array([[0, 255, 255]], np.uint8))] * 2 + [Image.new("L", (3, 1))] * 2
    )
    assert levels(to_rgb(inks)).tolist() == [[[255, 255, 255], [0, 0, 255], [0, 0, 255]]]
    image = stored(inks, "TIFF", icc_profile=cmyk_profile())
    # L* of 100 and 60: luminances 1 and 0.281; black point compensation moves L* of 20 to 0.
    white, shade, _ = levels(to_rgb(image))[0].tolist()
    assert white == [255] * 3
    assert max(shade) - min(shade) <= 2
    assert 120 < shade[0] < 150


def test_lab():
    image = Image.merge("LAB", [Image.new("L", (1, 1), level) for level in (127, 128, 128)])
    assert np.abs(levels(to_rgb(image)) - 118).max() <= 2


def test_a_damaged_or_unfit_profile_is_ignored(caplog):
    for profile in (b"no profile", cmyk_profile()):
        assert np.array_equal(levels(to_rgb(stored(Image.fromarray(COLORS), icc_profile=profile))), COLORS)
    assert "cannot be used" in caplog.text
    assert "of mode RGB has a colour profile for CMYK, which is ignored" in caplog.text


def test_the_gamma_of_a_png():
    image = Image.fromarray(np.array([[[0, 128, 255]]], np.uint8))
    linear = to_rgb(stored(image, pnginfo=chunk(b"gAMA", 100_000)))
    assert np.abs(levels(linear)[0, 0] - srgb(np.array([0, 128 / 255, 1]))).max() <= 0.5
    assert to_rgb(linear) is linear


def test_colours():
    assert rgb_of("white") == rgb_of("#fff") == (255, 255, 255)
    for color in ("whit", (1, 2), (0, 0, 256), 3, "#ffffff80"):
        with pytest.raises(ValueError, match="background=.*expected a colour such as"):
            rgb_of(color)


def chunk(name: bytes, value: int) -> PngInfo:
    info = PngInfo()
    info.add(name, bytes([value]) if name == b"sRGB" else struct.pack(">I", value))
    return info


def png(width: int, height: int, colour: int, depth: int, row: bytes, **chunks: bytes) -> bytes:
    """Return a PNG file of one row, with 16 bits a channel if `depth` says so."""
    import zlib

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    parts = [part(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [part(name.encode(), content) for name, content in chunks.items()]
    parts += [part(b"IDAT", zlib.compress(b"\0" + row)), part(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
