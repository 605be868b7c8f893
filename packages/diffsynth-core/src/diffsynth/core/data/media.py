"""Reading of video and sound by PyAV, which is imported at first use; `media_writer` writes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffsynth.core.data.image import cover, read_image
from diffsynth.errors import CorruptFile, NoFiles, Unavailable

Location = str | Path
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class VideoData(Sequence[Image.Image]):
    """Sequence of the frames of a video file or of a folder of images, decoded on access; fastest in order.

    One frame is in memory at a time. The packets of a file are scanned once, without decoding, by the constructor.

    Args:
        video_file: the video; or
        image_folder: a folder of images, sorted by the numbers in their names.
        height: in pixels; with `width`, each frame is scaled to cover this size and cropped about its centre.
        width: in pixels; given with `height`, or not at all.
        fps: frames per second of this sequence; the frames shown at these times are selected, so that a video keeps
            its speed. None selects every frame.

    Raises:
        ValueError: no source or two, only one of height and width, an `fps` that is not positive or given for a folder,
            or images of several sizes without a height and a width.
        NoFiles: the source does not exist, or a folder has no images.
        CorruptFile: a file has no video, or, without `fps`, a variable frame rate.
        Unavailable: PyAV is not installed.
    """

    def __init__(
        self,
        video_file: Location | None = None,
        image_folder: Location | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
    ) -> None:
        if (video_file is None) == (image_folder is None):
            raise ValueError("VideoData takes a video_file or an image_folder, one of them")
        if (height is None) != (width is None):
            raise ValueError(f"height={height} and width={width}: give both, or neither for the frames' own size")
        if fps is not None and (image_folder is not None or fps <= 0):
            raise ValueError(f"fps={fps}: expected a positive number, of a video file; images have no times")
        self.height, self.width = height, width
        self.frame_rate: Fraction | None = None
        self._video = None if video_file is None else _existing(video_file)
        self._images = [] if image_folder is None else _images_in(Path(image_folder))
        if self._video is None:
            self._indices: Sequence[int] = range(len(self._images))
            if height is None:
                _reject_mixed_sizes(self._images)
        else:
            timeline = Timeline.of(self._video)
            self.frame_rate = timeline.frame_rate if fps is None else Fraction(fps).limit_denominator(1001)
            self._indices = timeline.every_frame() if fps is None else timeline.at_rate(self.frame_rate)
        self._reader: Iterator[Image.Image] = iter(())
        self._at = -1
        self._frame: Image.Image | None = None

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """Return the frame at `index` as an image, or a list of frames for a slice."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        source = self._indices[index]
        frame = self._decoded(source) if self._video else read_image(self._images[source])
        return frame if self.height is None or self.width is None else cover(frame, self.height, self.width)

    def raw_data(self) -> list[Image.Image]:
        """Return a list of all frames of this sequence (selected by `fps`, scaled and cropped, if so constructed) as
        PIL images.
        """
        return list(self)

    def _decoded(self, index: int) -> Image.Image:
        assert self._video is not None
        if index < self._at or self._frame is None:
            self._reader, self._at = read_frames(self._video), -1
        while self._at < index:
            frame = next(self._reader, None)
            if frame is None:
                raise CorruptFile(
                    f"{self._video} ends after {self._at + 1} frames, but has packets for more; the file is damaged"
                )
            self._at, self._frame = self._at + 1, frame
        assert self._frame is not None
        return self._frame


@dataclass(frozen=True)
class Timeline:
    """Presentation times of the frames of a video.

    Args:
        path: the file, for messages.
        times: time of each frame in seconds since the first one, ascending.
        frame_rate: nominal frames per second of the file.
    """

    path: Path
    times: tuple[float, ...]
    frame_rate: Fraction

    @classmethod
    def of(cls, path: Location) -> Timeline:
        """Return the `Timeline` (times of the frames, frame rate) of a video file, from its packets, without decoding;
        raises like `read_frames`.
        """
        rate = frame_rate_of(path)
        with opened(path, "video") as (container, stream):
            packets = [packet for packet in container.demux(stream) if packet.size]
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
    def _steps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.times)]

    def every_frame(self) -> range:
        """Return the indices of all frames as a `range`; raise CorruptFile if the frame rate is variable.

        Raises:
            CorruptFile: a variable frame rate, with which the video would have a wrong speed.
        """
        longest = max(self._steps, default=self.usual_step)
        if longest > 1.5 * self.usual_step:
            raise CorruptFile(
                f"{self.path} has no constant frame rate: the median duration of a frame is "
                f"{1000 * self.usual_step:.0f} ms, the longest {1000 * longest:.0f} ms. Give VideoData an fps, to "
                f"select frames by their times."
            )
        return range(len(self.times))

    def at_rate(self, frame_rate: Fraction) -> list[int]:
        """Return a list of frame indices: for each multiple of `1 / frame_rate` seconds until the video ends, the frame
        shown then; indices may repeat or be skipped.
        """
        seconds = self.times[-1] + self.usual_step
        ticks = max(round(seconds * float(frame_rate)), 1)
        # Containers round times to milliseconds: a frame must not miss its tick by less.
        return [bisect_right(self.times, float(tick / frame_rate) + 1e-3) - 1 for tick in range(ticks)]


def read_frames(path: Location) -> Iterator[Image.Image]:
    """Yield each frame of a video file as an RGB PIL image, in order, decoded one by one.

    Raises:
        NoFiles: the file does not exist.
        CorruptFile: the file has no video that can be read.
        Unavailable: PyAV is not installed.
    """
    with opened(path, "video") as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield frame.to_image()


def frame_rate_of(path: Location) -> Fraction:
    """Return the nominal frames per second of a video file as a `Fraction`; raises like `read_frames`."""
    with opened(path, "video") as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise CorruptFile(f"{path} has no frame rate")
        return Fraction(rate)


def count_frames(path: Location) -> int:
    """Return the number of frames of a video file, an int, from its header, or by counting packets if the header has
    none; raises like `read_frames`.
    """
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
    with opened(path, "audio") as (container, stream):
        rate = sample_rate or int(stream.rate)
        # Channels are interleaved ("flt"), because PyAV reads past the planes of a frame of 8 channels ("fltp").
        resampler = av.AudioResampler(format="flt", layout="mono" if mono else None, rate=rate)
        parts = [
            torch.from_numpy(part.to_ndarray()).reshape(-1, part.layout.nb_channels)
            for frame in (*container.decode(stream), None)
            for part in resampler.resample(frame)
        ]
    if not parts:
        raise CorruptFile(f"{path} has an audio stream without samples")
    return torch.cat(parts).T.contiguous(), rate


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
    """Context manager that opens a media file and yields (PyAV container, its first "video" or "audio" stream); errors
    of PyAV become `CorruptFile`.
    """
    path, av = _existing(path), pyav()
    try:
        with av.open(str(path)) as container:
            streams = getattr(container.streams, kind)
            if not streams:
                raise CorruptFile(f"{path} has no {kind} stream")
            yield container, streams[0]
    except av.FFmpegError as error:
        raise CorruptFile(f"{path} cannot be read as {kind}: {error}") from error


def _existing(path: Location) -> Path:
    if not Path(path).is_file():
        raise NoFiles(f"{path} {'is a folder' if Path(path).is_dir() else 'does not exist'}")
    return Path(path)


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NoFiles(f"image_folder {folder} is not a folder")
    found = [file for file in folder.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES]
    if not found:
        raise NoFiles(f"image_folder {folder} has no images; expected {', '.join(_IMAGE_SUFFIXES)}")
    return sorted(found, key=_by_number)


def _reject_mixed_sizes(images: Sequence[Path]) -> None:
    sizes: dict[tuple[int, int], str] = {}
    for file in images:
        try:
            with Image.open(file) as image:
                sizes.setdefault(image.size, file.name)
        except (UnidentifiedImageError, OSError) as error:
            raise CorruptFile(f"{file} is not an image that can be read: {error}") from error
    if len(sizes) > 1:
        named = ", ".join(f"{name} of {width}x{height}" for (width, height), name in sizes.items())
        raise ValueError(f"images of {len(sizes)} sizes in {images[0].parent}: {named}; give a height and a width")


def _by_number(file: Path) -> tuple[int, str]:
    digits = "".join(letter for letter in file.stem if letter.isdigit())
    return (int(digits) if digits else -1, file.name)
