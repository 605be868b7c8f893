"""Colours, rotation and pixel shape of video, read from files that are written here with other tags."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data.media import VideoData, read_frames
from diffsynth.core.data.media_writer import merge_video_audio, save_video
from diffsynth.core.data.video_frame import encoded_tags, image_of
from diffsynth.errors import Refused

COLOR = np.array([200, 60, 40])


def write(path, lines, matrix="ITU601", color_range="MPEG", tags=None, pix_fmt="yuv444p", aspect=None):
    """Write frames of one colour, converted by `matrix`; the file is tagged only if `tags` says so."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, lines, pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        context = stream.codec_context
        if tags:
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = tags
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.full((lines, 32, 3), COLOR, np.uint8), format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=color_range)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def first_color(path) -> np.ndarray:
    return np.asarray(next(read_frames(path)))[8, 8].astype(int)


@pytest.mark.parametrize(
    ("lines", "matrix", "color_range", "tags"),
    [
        (96, "ITU601", "MPEG", (6, 1, 1, 1)),
        (96, "ITU709", "MPEG", (1, 1, 1, 1)),
        (96, "ITU709", "JPEG", (1, 2, 1, 1)),
        (720, "ITU601", "MPEG", (6, 1, 1, 1)),
        (96, "ITU601", "MPEG", None),
        (704, "ITU601", "MPEG", None),
        (720, "ITU709", "MPEG", None),
    ],
)
def test_matrix_and_range(tmp_path, lines, matrix, color_range, tags):
    path = write(tmp_path / "a.mp4", lines, matrix, color_range, tags)
    assert np.abs(first_color(path) - COLOR).max() <= 3


@pytest.mark.parametrize(("lines", "colorspace"), [(96, 6), (720, 1), (721, 1)])
def test_written_video_is_tagged(tmp_path, lines, colorspace):
    save_video([np.full((lines, 32, 3), COLOR, np.uint8)] * 2, tmp_path / "a.mp4", fps=10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (colorspace, 1)
        assert (context.color_primaries, context.color_trc) == (1, 1)
        y, u, v = (int(plane[8 * plane.line_size + 8]) for plane in map(_Plane, next(container.decode(video=0)).planes))
    kr, kb = (0.2126, 0.0722) if colorspace == 1 else (0.299, 0.114)
    luma = (kr * COLOR[0] + (1 - kr - kb) * COLOR[1] + kb * COLOR[2]) / 255
    expected = (
        16 + 219 * luma,
        128 + 224 * (COLOR[2] / 255 - luma) / (2 - 2 * kb),
        128 + 224 * (COLOR[0] / 255 - luma) / (2 - 2 * kr),
    )
    assert np.abs(np.array([y, u, v]) - expected).max() <= 2
    assert np.abs(first_color(tmp_path / "a.mp4") - COLOR).max() <= 3


class _Plane:
    def __init__(self, plane):
        self.line_size, self.values = plane.line_size, np.frombuffer(plane, np.uint8)

    def __getitem__(self, index):
        return self.values[index]


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
        ((0.001, 0.999, -0.998, 0), lambda a: np.rot90(a, -1)),
    ],
)
def test_the_display_matrix(tmp_path, matrix, turn, tone):
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :16], image[16:, :16] = (255, 0, 0), (0, 255, 0)
    save_video([image] * 2, tmp_path / "a.mp4", fps=10, quality=10)
    turned(tmp_path / "a.mp4", matrix)
    merge_video_audio(tmp_path / "a.mp4", tone(seconds=0.1))  # copies the frames with their matrix
    (frame, _) = VideoData(tmp_path / "a.mp4")
    expected = turn(image).astype(int)
    assert frame.size == expected.shape[1::-1]
    assert np.abs(np.asarray(frame).astype(int) - expected).mean() < 4


def test_another_angle_is_refused(tmp_path):
    save_video([Image.new("RGB", (32, 32))] * 2, tmp_path / "a.mp4")
    turned(tmp_path / "a.mp4", (0.8, 0.6, -0.6, 0.8))
    with pytest.raises(Refused, match=r"a.mp4: video is turned by -?\d+ degrees; only multiples of 90"):
        list(read_frames(tmp_path / "a.mp4"))


def turned(path, matrix) -> None:
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def test_pixels_that_are_not_square(tmp_path):
    (frame, _) = read_frames(write(tmp_path / "a.mp4", 64, aspect=Fraction(3, 2)))
    assert frame.size == (48, 64)


def test_video_with_alpha(tmp_path):
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgba"
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[:8] = (255, 0, 0, 255)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode(None))
    (frame,) = read_frames(tmp_path / "a.mov")
    assert (frame.getpixel((4, 4)), frame.getpixel((4, 12))) == ((255, 0, 0), (255, 255, 255))
    (frame,) = VideoData(tmp_path / "a.mov", background="black")
    assert frame.getpixel((4, 12)) == (0, 0, 0)


@pytest.mark.parametrize(("transfer", "white", "half"), [(16, 0.751827, 127), (18, 1.0, 100)])
def test_hdr_is_tone_mapped(tmp_path, transfer, white, half):
    """A telephone's HDR video looked grey and flat: its PQ or HLG signal was taken for SDR."""
    signal = np.full((32, 48, 3), 0, np.uint16)
    signal[:, 16:32], signal[:, 32:] = round(0.5 * 65535), round(white * 65535)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv444p10le"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = 9, 1, 9, transfer
        frame = av.VideoFrame.from_ndarray(signal, format="rgb48le")
        frame = frame.reformat(format="yuv444p10le", dst_colorspace="BT2020", dst_color_range="MPEG")
        frame.color_trc, frame.color_primaries = transfer, 9
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (image,) = read_frames(tmp_path / "a.mkv")
    black, grey, bright = (np.asarray(image)[16, x].astype(int) for x in (8, 24, 40))
    assert black.max() <= 2
    assert bright.min() >= 252
    # A signal of 50% is 92 cd/m2 in PQ and 51 cd/m2 in HLG; by ITU-R BT.2446, method A, 0.523 and 0.410 of gamma 2.4.
    assert np.abs(grey - half).max() <= 3


@pytest.mark.parametrize(("primaries", "expected"), [(1, COLOR), (12, (217, 42, 23)), (9, (247, 0, 23))])
def test_wide_primaries_of_sdr_become_srgb(tmp_path, primaries, expected):
    """(200, 60, 40) of Display P3 and of BT.2020, by the matrices of CSS Color 4 and ITU-R BT.2407."""
    path = write(tmp_path / "a.mp4", 96, "ITU709", "MPEG", (1, 1, primaries, 1))
    assert np.abs(first_color(path) - expected).max() <= 4


def test_colours_that_are_not_supported():
    frame = av.VideoFrame(16, 16, "yuv420p")
    frame.colorspace = 14
    with pytest.raises(Refused, match="video in ICtCp is not supported; convert it to BT.709 SDR"):
        image_of(frame, transfer=16)


def test_tags_of_an_encoder():
    class Context:
        colorspace = color_range = color_primaries = color_trc = None

    context = Context()
    assert encoded_tags(context, 720) == {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
    assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
    assert encoded_tags(context, 719)["dst_colorspace"] == "ITU601"
    assert context.colorspace == 6
