"""Images from files and URLs, and contact sheets."""

import functools
import http.server
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data.image import contact_sheet, cover, decode_image, fit, read_image, size_of
from diffsynth.core.data.operators import LoadImage
from diffsynth.errors import CorruptFile, DownloadFailed, NoFiles


@pytest.mark.parametrize(
    ("settings", "mode"), [({}, "RGB"), ({"convert_RGBA": True}, "RGBA"), ({"convert_RGB": False}, "LA")]
)
def test_modes(tmp_path, settings, mode):
    Image.new("LA", (4, 4), (90, 10)).save(tmp_path / "a.png")
    assert LoadImage(**settings)(tmp_path / "a.png").mode == mode


def test_no_image(tmp_path):
    (tmp_path / "a.png").write_text("text")
    for name, error, message in [
        ("gone.png", NoFiles, "gone.png does not exist"),
        ("", NoFiles, "is a folder"),
        ("a.png", CorruptFile, "a.png is not an image"),
    ]:
        with pytest.raises(error, match=message):
            LoadImage()(str(tmp_path / name))


def test_orientation_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (6, 4), (255, 0, 0, 0)).save(tmp_path / "a.png", exif=exif)
    assert size_of(tmp_path / "a.png") == (4, 6)
    for settings, mode, colour in [
        ({}, "RGB", (255, 255, 255)),
        ({"background": "black"}, "RGB", (0, 0, 0)),
        ({"mode": "RGBA"}, "RGBA", (255, 0, 0, 0)),
        ({"mode": None}, "RGBA", (255, 0, 0, 0)),
        ({"mode": "L"}, "L", 0),
    ]:
        image = read_image(tmp_path / "a.png", **settings)
        assert (image.mode, image.size, image.getpixel((0, 0))) == (mode, (4, 6), colour)
    assert LoadImage(background=(0, 0, 9))(tmp_path / "a.png").getpixel((0, 0)) == (0, 0, 9)
    with pytest.raises(ValueError, match="mode='CMYK': expected 'RGB', 'RGBA', 'L' for masks"):
        read_image(tmp_path / "a.png", "CMYK")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html><body>Not found", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"https://example.org/a.png", "it is a link"),
        (b"\0\0\0\x18ftypheic", "it is a HEIC image; convert it"),
        (b"\x89PNG\r\n\x1a\n", "it is a PNG image that is cut off or damaged"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, reason):
    (tmp_path / "p123.png").write_bytes(content)
    with pytest.raises(CorruptFile, match=f"p123.png is not an image that can be read: .*{reason}"):
        read_image(tmp_path / "p123.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_images_are_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptFile, match=f"cut.{suffix} is not an image that can be read"):
        read_image(path)


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG file whose header states a size."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(bytes(999))) + part(b"IEND", b"")


def test_enormous_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    (tmp_path / "poster.png").write_bytes(bomb(20_000, 20_000))
    with pytest.raises(ValueError, match="poster.png has 400000000 pixels; at most 178956970 are read"):
        read_image(tmp_path / "poster.png")
    with pytest.raises(ValueError, match="has 20000x20000 = 400000000 pixels; at most 399999999 are read"):
        read_image(tmp_path / "poster.png", max_pixels=399_999_999)
    monkeypatch.setenv("DIFFSYNTH_MAX_IMAGE_PIXELS", "23")
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png has 6x4 = 24 pixels; at most 23 are read.*DIFFSYNTH_MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=24).size == (6, 4)
    for value in ("no", "-1", "0"):
        monkeypatch.setenv("DIFFSYNTH_MAX_IMAGE_PIXELS", value)
        with pytest.raises(ValueError, match="DIFFSYNTH_MAX_IMAGE_PIXELS=.*expected a positive integer"):
            read_image(tmp_path / "a.png")


def test_the_limit_may_be_above_that_of_pil(tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=10**9).getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "poster.png").write_bytes(bomb(20_000, 20_000))
    assert size_of(tmp_path / "a.png") == (6, 4)
    with pytest.raises(CorruptFile, match="poster.png is not an image that can be read"):  # it has no pixels at all
        read_image(tmp_path / "poster.png", max_pixels=400_000_000)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CorruptFile, match="it is a text that begins with 'text'"):
        read_image(tmp_path / "a.txt", max_pixels=10**9)


def test_images_in_bytes():
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, "GIF")
    assert decode_image(file.getvalue(), "upload").size == (6, 4)
    with pytest.raises(CorruptFile, match="upload is not an image that can be read"):
        decode_image(file.getvalue(), "upload", formats=["PNG"])


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (61, 7), (7, 61)])
def test_a_strip_is_scaled_as_if_whole(size):
    """An image of 2000x1 pixels took 8 GB: it was scaled to cover the size, and then cropped."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    scale = 32 / min(size)
    whole = noise.resize((max(round(size[0] * scale), 32), max(round(size[1] * scale), 32)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
    difference = np.abs(np.asarray(cover(noise, 32, 32, Image.Resampling.BICUBIC)).astype(int) - expected)
    assert difference.max() <= (0 if max(size) < 4 * min(size) else 1)


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "pad"])
def test_a_strip_of_one_pixel_fits_every_size(resize_mode):
    strip = Image.new("L", (2000, 1), 255)
    assert fit(strip, 32, 32, resize_mode=resize_mode).size == (32, 32)
    assert fit(strip, 1, 2000, resize_mode=resize_mode) is strip
    with pytest.raises(ValueError, match="0x5 has no pixels"):
        fit(Image.new("L", (0, 5)), 8, 8, resize_mode=resize_mode)


def test_a_long_strip_is_not_scaled_whole():
    strip = Image.new("RGB", (2000, 1), "red")
    image = cover(strip, 1024, 1024)  # scaled whole it has two thousand million pixels
    assert (image.size, image.getpixel((5, 5))) == ((1024, 1024), (255, 0, 0))
    with pytest.raises(ValueError, match="0x5 has no pixels"):
        cover(Image.new("RGB", (0, 5)), 8, 8)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves /image.png after two failures, and /gone never."""

    def __init__(self, asked, *args):
        self.asked = asked
        super().__init__(*args)

    def do_GET(self):
        self.asked.append(self.path)
        status = 404 if self.path == "/gone" else 503 if len(self.asked) < 3 else 200
        self.send_response(status)
        self.end_headers()
        if status == 200:
            data = io.BytesIO()
            Image.new("RGB", (3, 2)).save(data, "png")
            self.wfile.write(data.getvalue())

    def log_message(self, *args):
        pass


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_url(served):
    url, asked = served
    assert LoadImage()(f"{url}/image.png").size == (3, 2)
    assert len(asked) == 3


def test_url_that_cannot_be_downloaded(served):
    url, asked = served
    with pytest.raises(DownloadFailed, match="in 2 trials"):
        LoadImage(url_max_retries=2)(f"{url}/image.png")
    asked.clear()
    with pytest.raises(DownloadFailed, match="/gone returns 404"):
        LoadImage()(f"{url}/gone")
    assert asked == ["/gone"]


def test_a_contact_sheet_shows_first_and_last(tmp_path, frames):
    sheet = contact_sheet(frames, columns=2, rows=2, width=24, gap=2)
    assert sheet.size == (50, 34)
    greys = [sheet.getpixel(place)[0] for place in ((0, 0), (49, 0), (0, 33), (49, 33), (24, 0))]
    assert greys == [0, 75, 150, 225, 0]
    assert contact_sheet(frames[:1], width=24).size == (24, 16)
    assert contact_sheet(frames[:3], columns=2, width=24, gap=0).size == (48, 32)
    with pytest.raises(ValueError, match="0 frames"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns=0"):
        contact_sheet(frames, columns=0)
