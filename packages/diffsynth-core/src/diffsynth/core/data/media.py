"""Reading of video and sound by PyAV, which is imported at first use; `media_writer` writes."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.arguments import check_integer
from diffsynth.core.data.animation import Animation, is_animated, is_image
from diffsynth.core.data.color import WHITE, Color, rgb_of
from diffsynth.core.data.content import AUDIO_KINDS, IMAGE_KINDS, VIDEO_KINDS, describe_file, existing_file
from diffsynth.core.data.image import cover, read_image, size_of
from diffsynth.core.data.video_frame import image_of
from diffsynth.errors import CorruptFile, NoFiles, Refused, Unavailable, shown

Location = str | Path
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")

_ATTACHED_IMAGE = 0x400
"""AV_DISPOSITION_ATTACHED_PIC of FFmpeg: a stream that is a cover image."""

ROUNDING = 1e-3
"""Seconds by which a frame may come late: containers round times to milliseconds."""


class VideoData(Sequence[Image.Image]):
    """Sequence of the frames of a video file, an animated image or a folder of images, decoded on access; fastest in
    order. Frames are RGB images in sRGB, upright.

    One frame is in memory at a time. The packets of a file are scanned once, without decoding, by the constructor; an
    animated image is decoded once.

    Args:
        video_file: the video, an animated GIF, WebP, APNG or AVIF, or the `Timeline` of one, which the constructor
            makes of a file otherwise; or
        image_folder: a folder of images, sorted by the numbers in their names, `frame2` before `frame10`.
        height: in pixels; with `width`, each frame is scaled to cover this size and cropped about its centre.
        width: in pixels; given with `height`, or not at all.
        fps: frames per second of this sequence; the frames shown at these times are selected, so that a video keeps
            its speed. None selects every frame.
        background: colour below transparent pixels.

    Raises:
        TypeError: a source that is neither a text nor a path.
        ValueError: no source or two, only one of height and width or another value than a positive integer, an `fps`
            that is not positive or given for a folder,
            images of several sizes without a height and a width, or an unknown colour.
        NoFiles: the source does not exist, or a folder has no images.
        CorruptFile: a file has no video, is cut off, or has, without `fps`, a variable frame rate.
        Unavailable: PyAV is not installed.
    """

    def __init__(
        self,
        video_file: Location | Timeline | None = None,
        image_folder: Location | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        background: Color = WHITE,
    ) -> None:
        if (video_file is None) == (image_folder is None):
            raise ValueError("VideoData takes a video_file or an image_folder, one of them")
        if (height is None) != (width is None):
            raise ValueError(f"height={height} and width={width}: give both, or neither for the frames' own size")
        if height is not None:
            check_integer("height", height, least=1)
            check_integer("width", width, least=1)
        rate = None if fps is None else frame_rate(fps)
        if rate is not None and image_folder is not None:
            raise ValueError(f"fps={fps}: expected a video file; the images of a folder have no times")
        self.height, self.width = height, width
        self.background = rgb_of(background)
        self.frame_rate: Fraction | None = None
        known = video_file if isinstance(video_file, Timeline) else None
        source = known.path if known else video_file
        self._video = None if source is None else existing_file(source, "video")
        self._images = [] if image_folder is None else _images_in(Path(image_folder))
        if self._video is None:
            self._indices: Sequence[int] = range(len(self._images))
            if height is None:
                _reject_mixed_sizes(self._images)
        else:
            timeline = known or Timeline.of(self._video)
            self.frame_rate = timeline.frame_rate if rate is None else rate
            self._indices = timeline.every_frame() if rate is None else timeline.at_rate(rate)
        self._reader: Iterator[Image.Image] = iter(())
        self._at = -1
        self._frame: Image.Image | None = None

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """Return the frame at `index` as an image, or a list of frames for a slice."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        index %= len(self)
        source = self._indices[index]
        frame = self._decoded(source) if self._video else read_image(self._images[source], background=self.background)
        return frame if self.height is None or self.width is None else cover(frame, self.height, self.width)

    def raw_data(self) -> list[Image.Image]:
        """Return a list of all frames of this sequence (selected by `fps`, scaled and cropped, if so constructed) as
        PIL images.
        """
        return list(self)

    def _decoded(self, index: int) -> Image.Image:
        assert self._video is not None
        if index < self._at or self._frame is None:
            self._reader, self._at = read_frames(self._video, background=self.background), -1
        while self._at < index:
            frame = next(self._reader, None)
            if frame is None:
                raise CorruptFile(
                    f"{self._video} ends after {self._at + 1} frames, but has packets for more; the file is damaged"
                )
            self._at, self._frame = self._at + 1, frame
        assert self._frame is not None
        return self._frame


def open_media(path: Location) -> Image.Image | VideoData:
    """Return what is in a file by its content: a `VideoData` of a video, an animated image or a folder of images; else
    the PIL image, upright, in the mode, colours and transparency of the file, which pipelines convert.

    A video with a variable frame rate is read at the rate that the file states, by the times of its frames.

    Raises:
        TypeError, NoFiles, CorruptFile, ValueError, Unavailable: see `VideoData` and `image.read_image`.
    """
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        return VideoData(image_folder=path)
    file = existing_file(path, "file")
    kind = describe_file(file)
    if kind in IMAGE_KINDS and not is_animated(file):
        return read_image(file, None)
    if kind in IMAGE_KINDS or kind in VIDEO_KINDS or file.suffix.lower() in VIDEO_SUFFIXES:
        timeline = Timeline.of(file)
        return VideoData(timeline, fps=None if timeline.is_constant else float(timeline.frame_rate))
    return read_image(file, None)


@dataclass(frozen=True)
class Timeline:
    """Presentation times of the frames of a video or an animated image.

    Args:
        path: the file, for messages.
        times: time of each frame in seconds since the first one, ascending.
        frame_rate: nominal frames per second of the file.
        end: time at which the last frame ends, in seconds; None is a usual step after its start.
    """

    path: Path
    times: tuple[float, ...]
    frame_rate: Fraction
    end: float | None = None

    @classmethod
    def of(cls, path: Location) -> Timeline:
        """Return the `Timeline` (times of the frames, frame rate) of a video file, from its packets, without decoding,
        or of an animated image; raises like `read_frames`.
        """
        if is_image(existing_file(path, "video")):
            times, end = Animation(path).times()
            return cls(Path(path), times, Fraction(len(times) / end).limit_denominator(1001), end)
        with opened(path, "video") as (container, stream):
            rate = _nominal_rate(path, stream)
            packets = [each for each in whole_packets(path, container, stream) if each.size and not each.is_discard]
            stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
            base = stream.time_base
        if not packets:
            raise CorruptFile(f"{path} has a video without frames")
        if len(stamps) < len(packets):  # containers without timestamps, such as old AVIs
            return cls(Path(path), tuple(float(index / rate) for index in range(len(packets))), rate)
        return cls(Path(path), tuple(float((stamp - stamps[0]) * base) for stamp in stamps), rate)

    @property
    def usual_step(self) -> float:
        """Median duration of a frame, in seconds; for a single frame, 1 / frame rate."""
        steps = sorted(self._steps)
        return steps[len(steps) // 2] if steps else float(1 / self.frame_rate)

    @property
    def is_constant(self) -> bool:
        """Whether the frame rate is constant: no frame is shown for more than 1.5 times the usual step."""
        return self._longest <= 1.5 * self.usual_step

    @property
    def _longest(self) -> float:
        return max(self._steps, default=self.usual_step)

    @property
    def _steps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.times)]

    def every_frame(self) -> range:
        """Return the indices of all frames as a `range`; raise CorruptFile if the frame rate is variable.

        Raises:
            CorruptFile: a variable frame rate, with which the video would have a wrong speed.
        """
        if not self.is_constant:
            raise CorruptFile(
                f"{self.path} has no constant frame rate: the median duration of a frame is "
                f"{1000 * self.usual_step:.0f} ms, the longest {1000 * self._longest:.0f} ms. Give VideoData an fps, "
                f"to select frames by their times."
            )
        return range(len(self.times))

    def at_rate(self, frame_rate: Fraction) -> list[int]:
        """Return a list of frame indices: for each multiple of `1 / frame_rate` seconds until the video ends, the frame
        shown then; indices may repeat or be skipped.
        """
        seconds = self.times[-1] + self.usual_step if self.end is None else self.end
        ticks = max(round(seconds * float(frame_rate)), 1)
        return [bisect_right(self.times, float(tick / frame_rate) + ROUNDING) - 1 for tick in range(ticks)]


def read_frames(path: Location, *, background: Color = WHITE) -> Iterator[Image.Image]:
    """Yield each frame of a video file or an animated image as an RGB PIL image, in order, decoded one by one; see
    `video_frame.image_of`.

    Args:
        path: the file.
        background: colour below transparent pixels.

    Raises:
        NoFiles: the file does not exist.
        CorruptFile: the file has no video that can be read, or is cut off.
        Refused: the video has colours of a kind that is not supported.
        Unavailable: PyAV is not installed.
    """
    return (frame for _, frame in read_timed_frames(path, background=background))


def read_timed_frames(path: Location, *, background: Color = WHITE) -> Iterator[tuple[float, Image.Image]]:
    """Yield (time in seconds since the first frame, frame) of each frame; see `read_frames`."""
    if is_image(existing_file(path, "video")):
        for time, _, image in Animation(path, background=background).frames():
            yield time, image
        return
    with opened(path, "video") as (container, stream):
        stream.thread_type = "AUTO"
        context, aspect = stream.codec_context, stream.sample_aspect_ratio
        transfer, primaries = int(context.color_trc), int(context.color_primaries)
        first, step = None, 1 / float(stream.average_rate or stream.guessed_rate or 1)
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise CorruptFile(f"{path} is damaged or cut off: frame {index} cannot be decoded whole")
            first = frame.time if first is None else first
            time = index * step if frame.time is None else frame.time - first
            yield (
                time,
                image_of(frame, transfer=transfer, primaries=primaries, pixel_aspect=aspect, background=background),
            )


def frame_rate(fps: float) -> Fraction:
    """Return a frame rate, a number of any library, as a `Fraction` with a denominator of at most 1001, as those of
    videos have.

    Args:
        fps: frames per second, above 0.

    Raises:
        ValueError: it is no number, not finite, or not positive.
    """
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps < math.inf:
        raise ValueError(f"fps={shown(fps)}: expected a positive number")
    rate = Fraction(fps if isinstance(fps, Fraction) else float(fps)).limit_denominator(1001)
    if not rate:
        raise ValueError(f"fps={shown(fps)}: expected a number of at least 1/1001")
    return rate


def frame_rate_of(path: Location) -> Fraction:
    """Return the nominal frames per second of a video file, or the mean ones of an animated image, as a `Fraction`;
    raises like `read_frames`.
    """
    if is_image(existing_file(path, "video")):
        return Timeline.of(path).frame_rate
    with opened(path, "video") as (_, stream):
        return _nominal_rate(path, stream)


def _nominal_rate(path: Location, stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise CorruptFile(f"{path} has no frame rate")
    return Fraction(rate)


def count_frames(path: Location) -> int:
    """Return the number of frames of a video file, an int, from its header, or by counting packets if the header has
    none, or of an animated image; raises like `read_frames`.
    """
    if is_image(existing_file(path, "video")):
        return len(Timeline.of(path).times)
    with opened(path, "video") as (container, stream):
        return int(stream.frames) or sum(1 for packet in container.demux(stream) if packet.size)


def read_audio(
    path: Location, sample_rate: int | None = None, *, mono: bool = False
) -> tuple[Float[Tensor, "channels samples"], int]:
    """Return (fp32 tensor `channels samples` in [-1, 1], sample rate in Hz as an int) of the sound of an audio or video
    file.

    Args:
        path: the file.
        sample_rate: samples per second; None keeps that of the file.
        mono: return the mean of the channels as one channel.

    Returns:
        fp32 samples in [-1, 1] on the CPU, and their rate.

    Raises:
        NoFiles: the file does not exist.
        CorruptFile: the file has no sound that can be read.
        Unavailable: PyAV is not installed.
    """
    av = pyav()
    if sample_rate is not None and (isinstance(sample_rate, bool) or not 0 < sample_rate < 2**31):
        raise ValueError(f"sample_rate={sample_rate!r}: expected a positive number of samples per second, or None")
    with opened(path, "audio") as (container, stream):
        if not stream.rate:
            raise CorruptFile(f"{path} has sound without a sample rate")
        rate = int(sample_rate or stream.rate)
        # Channels are interleaved ("flt"), because PyAV reads past the planes of a frame of 8 channels ("fltp").
        resampler = av.AudioResampler(format="flt", rate=rate)
        frames = (frame for packet in whole_packets(path, container, stream) for frame in packet.decode())
        try:
            parts = [
                torch.from_numpy(part.to_ndarray()).reshape(-1, part.layout.nb_channels)
                for frame in chain(frames, [None])
                for part in resampler.resample(frame)
            ]
        except av.FFmpegError:  # some of them are ValueErrors
            raise
        except ValueError as error:
            raise CorruptFile(f"{path} changes its sample rate, format or channels midway: {error}") from error
    if not parts:
        raise CorruptFile(f"{path} has an audio stream without samples")
    if len({part.shape[1] for part in parts}) > 1:
        raise CorruptFile(f"{path} changes its number of channels, from {parts[0].shape[1]} to {parts[-1].shape[1]}")
    samples = torch.cat(parts).T.contiguous()
    # FFmpeg's "mono" of floating point is no mean: it weighs channels by their place, and may exceed 1.
    return samples.mean(dim=0, keepdim=True) if mono else samples, rate


def pyav() -> Any:
    """Import PyAV and return its module `av`.

    Raises:
        Unavailable: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise Unavailable("video and sound need PyAV. Run: pip install av") from error
    return av


@contextmanager
def opened(path: Location, kind: str) -> Iterator[tuple[Any, Any]]:
    """Context manager that opens a media file and yields (PyAV container, its first "video" or "audio" stream that is
    not a cover image); errors of PyAV become `CorruptFile`.
    """
    file, av = existing_file(path, kind), pyav()
    try:
        with av.open(str(file)) as container:
            streams = [each for each in getattr(container.streams, kind) if not _is_cover(each)]
            if not streams:
                raise CorruptFile(f"{file} has no {kind} stream")
            if streams[0].codec_context is None:
                raise CorruptFile(f"{file} has {kind} in a format that FFmpeg does not know")
            yield container, streams[0]
    except Refused as error:
        raise Refused(f"{file}: {error}") from error
    except (av.FFmpegError, UnicodeError) as error:
        found = describe_file(file)
        what = "" if found in (*VIDEO_KINDS, *AUDIO_KINDS) else f"; it is {found}"
        raise CorruptFile(f"{file} cannot be read as {kind}: {error}{what}") from error


def whole_packets(path: Location, container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of a stream that hold data, in the order of the file, and the empty one that ends it; all of
    the file is read.

    Raises:
        CorruptFile: a packet is damaged, or the file ends before the end that its header states; raised then.
    """
    count, end = 0, Fraction(0)
    for packet in container.demux():
        if packet.is_corrupt:
            raise CorruptFile(f"{path} is cut off or damaged: a part of its {packet.stream.type} is missing")
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.time_base is not None:
            end = max(end, (stamp + (packet.duration or 0)) * packet.time_base)
        if packet.stream.index == stream.index:
            count += bool(packet.size)
            yield packet
    _reject_cut(Path(path), container, stream, count=count, end=float(end))


def _reject_cut(path: Path, container: Any, stream: Any, *, count: int, end: float) -> None:
    """Raise CorruptFile if a file ends early: fewer packets than its header has, or less time, or fewer bytes."""
    name = container.format.name
    if "mp4" in name and count < stream.frames:
        raise CorruptFile(f"{path} is cut off: it has {count} packets of {stream.type} of {stream.frames}")
    stated = (container.duration or 0) / 1e6
    states_time = "matroska" in name or (name == "mp3" and _mp3_states_its_length(path))
    if states_time and end < stated - max(0.5, 0.02 * stated):
        raise CorruptFile(f"{path} is cut off: it ends after {end:.2f} s of {stated:.2f} s")
    if name == "wav":
        with path.open("rb") as file:
            head = file.read(8)
        size, actual = int.from_bytes(head[4:], "little") + 8, path.stat().st_size
        # A program that writes into a pipe cannot know the size, and states the largest one, or none.
        if head[:4] == b"RIFF" and actual + 8 < size < 0x7FFFFF00:
            raise CorruptFile(f"{path} is cut off: it has {actual} bytes of {size}")


def _mp3_states_its_length(path: Path) -> bool:
    """Return whether the first frame of an MP3 file states its length; FFmpeg estimates that of others."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # its size is in four bytes of 7 bits
            size = sum(part << 7 * place for part, place in zip(head[6:10], (3, 2, 1, 0), strict=True))
            file.seek(10 + size)
        start = file.read(256)
    return any(mark in start for mark in (b"Xing", b"Info", b"VBRI"))


def _is_cover(stream: Any) -> bool:
    return bool(int(stream.disposition) & _ATTACHED_IMAGE)


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NoFiles(f"image_folder {folder} is not a folder")
    files = (file for file in folder.iterdir() if not file.name.startswith("."))  # macOS stores "._frame1.png"
    found = [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
    if not found:
        raise NoFiles(f"image_folder {folder} has no images; expected {', '.join(_IMAGE_SUFFIXES)}")
    return sorted(found, key=_natural)


def _reject_mixed_sizes(images: Sequence[Path]) -> None:
    sizes: dict[tuple[int, int], str] = {}
    for file in images:
        sizes.setdefault(size_of(file), file.name)
    if len(sizes) > 1:
        named = ", ".join(f"{name} of {width}x{height}" for (width, height), name in sizes.items())
        raise ValueError(
            f"images of {len(sizes)} sizes in {images[0].parent}: {named}; make them one size, or scale them "
            "as they are read: VideoData(image_folder=..., height=..., width=...)"
        )


def _natural(file: Path) -> list[tuple[int, int, str]]:
    """Return the key of a name in natural order: its numbers by value, the texts between them without case."""
    parts = re.split(r"([0-9]+)", file.stem.lower())
    key = [(1, int(part[:18]), part) if part.isdecimal() else (0, 0, part) for part in parts]
    return [*key, (0, 0, file.name)]
