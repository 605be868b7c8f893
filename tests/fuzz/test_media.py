"""Damaged images, clips and sounds: each is read, or refused by an error of ours that names the file."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from diffsynth.core.data.image import read_image
from diffsynth.core.data.media import VideoData, open_media, read_audio
from diffsynth.core.data.media_writer import save_audio, save_video
from diffsynth.errors import DiffsynthError

fuzzing = settings(max_examples=150, deadline=None, derandomize=True, database=None)
READERS = {"image": read_image, "any": open_media, "clip": lambda path: VideoData(path, fps=5)[:9], "sound": read_audio}


def images() -> dict[str, bytes]:
    """Return name -> content of small images, some with EXIF data, a profile, frames or a palette."""
    noise = [np.random.default_rng(index).integers(0, 256, (24, 32, 3), dtype=np.uint8) for index in range(3)]
    first, *others = map(Image.fromarray, noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    described = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    animated = {"save_all": True, "append_images": others, "duration": 80}
    files = [
        ("a.png", first, described),
        ("a.jpg", first, described),
        ("a.tif", first, {"compression": "tiff_lzw", **described}),
        ("cmyk.jpg", first.convert("CMYK"), {}),
        ("palette.png", first.quantize(16), {"transparency": 3}),
        ("grey.png", Image.fromarray(noise[0].astype(np.uint16)[..., 0] * 257), {}),
        ("a.bmp", first, {}),
        ("a.gif", first, animated),
        ("a.webp", first, animated),
        ("apng.png", first, animated),
    ]
    contents = {}
    for name, image, options in files:
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2]), **options)
        contents[name] = file.getvalue()
    return contents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return (folder, name -> content of an undamaged file)."""
    folder = tmp_path_factory.mktemp("media")
    frames = [Image.new("RGB", (32, 16), (level, 9, 9)) for level in (0, 90, 180)]
    for suffix in ("mp4", "mkv", "avi"):
        save_video(frames, folder / f"v.{suffix}", fps=10)
    save_audio(torch.linspace(-1, 1, 900)[None].repeat(2, 1), folder / "s.wav", 8000)
    logging.getLogger("diffsynth").setLevel(logging.ERROR)
    yield folder, {**images(), **{file.name: file.read_bytes() for file in folder.iterdir()}}
    logging.getLogger("diffsynth").setLevel(logging.NOTSET)


@st.composite
def damages(draw):
    """Return a function that cuts a file, or changes some of its bytes, rather those of its head."""
    cut = draw(st.one_of(st.none(), st.floats(0, 1)))
    places = st.one_of(st.integers(0, 63), st.floats(0, 1))
    values = st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255))
    changes = draw(st.lists(st.tuples(places, values), max_size=6))

    def damage(content: bytes) -> bytes:
        data = bytearray(content)
        for place, value in changes:
            index = place if isinstance(place, int) else int(place * len(data))
            data[min(index, len(data) - 1)] = value
        return bytes(data if cut is None else data[: int(cut * len(data))])

    return damage


@fuzzing
@given(data=st.data())
def test_damaged_files(corpus, data):
    folder, contents = corpus
    name = data.draw(st.sampled_from(sorted(contents)))
    path = folder / f"damaged-{name}"
    path.write_bytes(data.draw(damages())(contents[name]))
    read = READERS[data.draw(st.sampled_from(sorted(READERS)))]
    try:
        read(path)
    except (DiffsynthError, ValueError) as error:
        assert path.name in str(error)  # noqa: PT017 - a file that is read is right, too


def test_side_data_that_pyav_does_not_know(tmp_path):
    """EXIF data in a JPEG frame are side data of a type that PyAV 18 does not list: a traceback, once."""
    content = images()["a.jpg"]
    (tmp_path / "a.mjpeg").write_bytes(content * 2)
    for path in (tmp_path / "a.mjpeg", tmp_path / "a.avi"):
        path.write_bytes(content)
        assert VideoData(path)[0].size == (24, 32)


def test_a_format_that_ffmpeg_does_not_know(tmp_path):
    """The codec of a damaged WAV header may be none at all: an AttributeError, once."""
    save_audio(torch.zeros(1, 900), tmp_path / "a.wav", 8000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[20:22] = b"\x99\x99"
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DiffsynthError, match=r"a.wav has audio in a format that FFmpeg does not know"):
        read_audio(tmp_path / "a.wav")
