import re

import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data.image_writer import read_image_comment, save_gif, save_jpeg, save_webp
from diffsynth.core.data.media import Timeline, open_media
from diffsynth.errors import CorruptFile, NoFiles

COMMENT = '{"prompt": "äpple 苹果 🍎"}'
PARAMETERS = "äpple 苹果 🍎\nSteps: 4, Seed: 7, Size: 32x16"


def gradient(mode="RGB", size=(32, 16)):
    channels = len(Image.new(mode, (1, 1)).getbands())
    levels = np.linspace(0, 255, size[0] * size[1] * channels).astype(np.uint8)
    return Image.fromarray(levels.reshape(size[1], size[0], channels).squeeze(), mode)


def difference(first, second):
    return int(np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max())


@pytest.mark.parametrize("save", [save_jpeg, lambda image, path, **options: save_webp([image], path, **options)])
def test_pixels_and_both_texts_of_one_image(tmp_path, save):
    path = tmp_path / "a.bin"
    save(gradient(), path, comment=COMMENT, parameters=PARAMETERS)
    image = Image.open(path)
    assert image.mode == "RGB"
    assert difference(image, gradient()) <= 8
    assert read_image_comment(path) == COMMENT
    # As A1111 writes it: eight bytes that name the encoding, and UTF-16, big endian.
    assert image.getexif().get_ifd(0x8769)[0x9286] == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
    save(gradient(), path)
    assert read_image_comment(path) is None


def test_quality(tmp_path):
    sizes = []
    for quality in (10, 50, 100):
        save_jpeg(gradient(), tmp_path / "a.jpg", quality=quality)
        save_webp([gradient()], tmp_path / "a.webp", quality=quality)
        sizes.append(((tmp_path / "a.jpg").stat().st_size, difference(Image.open(tmp_path / "a.webp"), gradient())))
    assert [size for size, _ in sizes] == sorted(size for size, _ in sizes)
    assert sizes[0][1] > 0
    assert sizes[-1][1] == 0  # 100 is lossless for WebP


def test_jpeg_keeps_grey_and_refuses_transparency(tmp_path):
    save_jpeg(gradient("L"), tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").mode == "L"
    with pytest.raises(ValueError, match="JPEG cannot hold transparency, and the image is of mode RGBA; write PNG"):
        save_jpeg(gradient("RGBA"), tmp_path / "b.jpg")
    assert not (tmp_path / "b.jpg").exists()
    save_webp([gradient("RGBA")], tmp_path / "a.webp", quality=100)
    assert Image.open(tmp_path / "a.webp").getpixel((20, 9)) == gradient("RGBA").getpixel((20, 9))


def test_jpeg_has_room_for_64_kilobytes(tmp_path, caplog):
    save_jpeg(gradient(), tmp_path / "a.jpg", comment="x" * 20_000, parameters="y" * 20_000)
    assert read_image_comment(tmp_path / "a.jpg") == "x" * 20_000
    assert "the A1111 parameters are left out" in caplog.text
    with pytest.raises(
        ValueError, match=r"JPEG holds 64 KB of texts, and the comment takes 80\d\d\d bytes; write PNG or"
    ):
        save_jpeg(gradient(), tmp_path / "b.jpg", comment="x" * 40_000)


def test_an_animation_of_webp(tmp_path):
    frames = [Image.new("RGB", (32, 16), (level, 0, 0)) for level in (10, 90, 200)]
    save_webp(frames, tmp_path / "a.webp", fps=15, quality=100, comment=COMMENT)
    assert [frame.getpixel((3, 3))[0] for frame in open_media(tmp_path / "a.webp")] == [10, 90, 200]
    assert np.allclose(Timeline.of(tmp_path / "a.webp").times, [0, 1 / 15, 2 / 15], atol=0.0006)
    assert read_image_comment(tmp_path / "a.webp") == COMMENT


def test_an_animation_of_gif_keeps_its_time(tmp_path):
    frames = [Image.new("RGB", (32, 16), (level, 0, 0)) for level in range(0, 160, 10)]
    save_gif(frames, tmp_path / "a.gif", fps=15, comment=COMMENT)
    video = open_media(tmp_path / "a.gif")
    assert [frame.getpixel((3, 3))[0] for frame in video] == list(range(0, 160, 10))
    # 67 ms cannot be stored: shown for 70 ms each, the last of these frames would be 50 ms late.
    assert np.allclose(Timeline.of(tmp_path / "a.gif").times, np.arange(16) / 15, atol=0.005 + 1e-9)
    assert read_image_comment(tmp_path / "a.gif") == COMMENT


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: save_jpeg("a", path), "image='a': expected a PIL image"),
        (
            lambda path: save_jpeg(gradient(), path, quality=0),
            "quality=0: expected a number from 1 to 100",
        ),
        (lambda path: save_webp([], path), "0 frames; expected at least one"),
        (lambda path: save_webp([gradient(), gradient()], path), "2 frames without fps"),
        (
            lambda path: save_gif([gradient(), gradient(size=(8, 8))], path, fps=8),
            "frames of the sizes (32, 16), (8, 8)",
        ),
        (lambda path: save_gif([gradient()], path, fps=60), "fps=60: expected a number from 0.01 to 50"),
    ],
)
def test_what_is_refused_leaves_no_file(tmp_path, save, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(CorruptFile, match=r"a\.jpg is not an image"):
        read_image_comment(tmp_path / "a.jpg")
    with pytest.raises(NoFiles):
        read_image_comment(tmp_path / "b.jpg")
