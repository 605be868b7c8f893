"""Animated images are clips: frames, transparency and durations."""

import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data.animation import Animation, is_animated, is_image
from diffsynth.core.data.media import VideoData, frame_rate_of, read_frames
from diffsynth.errors import CorruptFile, NoFiles

DURATIONS = [100, 200, 100, 400]


def write(path, **settings):
    """Write four frames: red grows by 60 from frame to frame, and the right half is transparent."""
    frames = []
    for index in range(4):
        frame = Image.new("RGBA", (16, 8), (60 * index, 0, 0, 255))
        frame.paste((0, 255, 0, 0), (8, 0, 16, 8))
        frames.append(frame)
    lossless = {".webp": {"lossless": True}, ".gif": {"disposal": 2}}.get(path.suffix, {})
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=DURATIONS, **lossless, **settings)
    return path


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_frames_and_their_times(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}")
    times, durations, images = zip(*Animation(path).frames(), strict=True)
    assert times == pytest.approx([0, 0.1, 0.3, 0.4])
    assert durations == pytest.approx([0.1, 0.2, 0.1, 0.4])
    assert [image.getpixel((2, 2)) for image in images] == [(60 * index, 0, 0) for index in range(4)]
    assert {image.getpixel((12, 2)) for image in images} == {(255, 255, 255)}
    assert next(Animation(path, background="blue").frames())[2].getpixel((12, 2)) == (0, 0, 255)
    assert Animation(path).times()[1] == pytest.approx(0.8)
    assert is_animated(path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_video_data_of_an_animation(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}")
    with pytest.raises(CorruptFile, match="no constant frame rate"):
        VideoData(path)
    video = VideoData(path, fps=10)
    assert [frame.getpixel((2, 2))[0] for frame in video] == [0, 60, 60, 120, 180, 180, 180, 180]
    assert video[-1].getpixel((2, 2))[0] == 180
    assert frame_rate_of(path) == 5
    assert len(list(read_frames(path))) == 4


def test_a_still_image_beside_the_animation_is_no_frame(tmp_path):
    times, _ = Animation(write(tmp_path / "a.png", default_image=True)).times()
    assert len(times) == 3


def test_a_still_image_is_one_frame_and_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.png", exif=exif)
    assert is_image(tmp_path / "a.png")
    assert not is_animated(tmp_path / "a.png")
    assert [frame.size for frame in VideoData(tmp_path / "a.png")] == [(8, 16)]


def test_pages_are_no_frames(tmp_path):
    """A TIFF file of several pages is no clip, and a JPEG file is one frame, turned as its EXIF data say."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pages = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "a.jpg", exif=exif)
    assert not is_animated(tmp_path / "a.tif")
    assert [frame.getpixel((0, 0)) for frame in VideoData(tmp_path / "a.tif")] == [(255, 0, 0)]
    assert [frame.size for frame in VideoData(tmp_path / "a.jpg")] == [(8, 16)]


def test_damaged_animations(tmp_path):
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)) for i in range(4)]
    noise[0].save(tmp_path / "a.png", save_all=True, append_images=noise[1:], duration=100)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(CorruptFile, match="a.png cannot be read from frame 2 on"):
        VideoData(tmp_path / "a.png")
    with pytest.raises(NoFiles, match="gone.gif does not exist"):
        Animation(tmp_path / "gone.gif")
