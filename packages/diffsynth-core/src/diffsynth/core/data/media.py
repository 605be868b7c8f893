"""Reading video and sound through PyAV, which is imported when it is needed; `media_writer` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import LoadImage, cover
from diffsynth.errors import CorruptFile, NoFiles, Unavailable

Location = str | Path
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class VideoData(Sequence[Image.Image]):
    """The frames of a video file or of a folder of images, read when they are asked for; cheapest in order.

    Args:
        video_file: the video.
        image_folder: or the images, in the order of the numbers in their names.
        height: with `width`, each frame is scaled to cover this size and cropped about its centre.
        width: likewise.

    Raises:
        ValueError: no source or two, or one of height and width alone.
        NoFiles: the source is not there, or a folder without images.
    """

    def __init__(
        self,
        video_file: Location | None = None,
        image_folder: Location | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        if (video_file is None) == (image_folder is None):
            raise ValueError("VideoData takes a video_file or an image_folder, one of them")
        if (height is None) != (width is None):
            raise ValueError(f"height={height} and width={width}: give both, or neither for the frames' own size")
        self.height, self.width = height, width
        self._video = None if video_file is None else _existing(video_file)
        self._images = [] if image_folder is None else _images_in(Path(image_folder))
        self._count: int | None = None if self._video else len(self._images)
        self._reader: Iterator[Image.Image] = iter(())
        self._at = -1
        self._frame: Image.Image | None = None

    def __len__(self) -> int:
        if self._count is None:
            assert self._video is not None
            self._count = count_frames(self._video)
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """A frame, or a list of frames for a slice."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        frame = self._decoded(index) if self._video else LoadImage()(self._images[index])
        return frame if self.height is None or self.width is None else cover(frame, self.height, self.width)

    def raw_data(self) -> list[Image.Image]:
        """All frames."""
        return list(self)

    def _decoded(self, index: int) -> Image.Image:
        assert self._video is not None
        if index < self._at or self._frame is None:
            self._reader, self._at = read_frames(self._video), -1
        while self._at < index:
            frame = next(self._reader, None)
            if frame is None:
                raise CorruptFile(f"{self._video} ends after {self._at + 1} frames; its header says {len(self)}")
            self._at, self._frame = self._at + 1, frame
        assert self._frame is not None
        return self._frame


def read_frames(path: Location) -> Iterator[Image.Image]:
    """All frames of a video as RGB images, decoded one by one.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: it has no video that can be read.
        Unavailable: PyAV is not installed.
    """
    with opened(path, "video") as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield frame.to_image()


def frame_rate_of(path: Location) -> Fraction:
    """Frames per second, as the file says; raises like `read_frames`."""
    with opened(path, "video") as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise CorruptFile(f"{path} does not say how many frames it has per second")
        return Fraction(rate)


def count_frames(path: Location) -> int:
    """Frames in a video; counted by its packets where the file does not say. Raises like `read_frames`."""
    with opened(path, "video") as (container, stream):
        return int(stream.frames) or sum(1 for packet in container.demux(stream) if packet.size)


def read_audio(
    path: Location, sample_rate: int | None = None, *, mono: bool = False
) -> tuple[Float[Tensor, "channels samples"], int]:
    """The sound of an audio or video file.

    Args:
        path: of the file.
        sample_rate: samples per second; None keeps the file's.
        mono: the mean of its channels, as one.

    Returns:
        fp32 samples in [-1, 1] on the CPU, and their rate.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: it has no sound that can be read.
        Unavailable: PyAV is not installed.
    """
    av = pyav()
    with opened(path, "audio") as (container, stream):
        rate = sample_rate or int(stream.rate)
        resampler = av.AudioResampler(format="fltp", layout="mono" if mono else None, rate=rate)
        parts = [
            torch.from_numpy(part.to_ndarray())
            for frame in (*container.decode(stream), None)
            for part in resampler.resample(frame)
        ]
    if not parts:
        raise CorruptFile(f"{path} has a sound of no length")
    return torch.cat(parts, dim=1), rate


def pyav() -> Any:
    """The library.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise Unavailable("video and sound need PyAV. Run: pip install av") from error
    return av


@contextmanager
def opened(path: Location, kind: str) -> Iterator[tuple[Any, Any]]:
    """A file and its first stream of a kind; what PyAV raises meanwhile names the file."""
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
    found = [file for file in folder.iterdir() if file.suffix.lower() in _PICTURES]
    if not found:
        raise NoFiles(f"image_folder {folder} has no images; expected {', '.join(_PICTURES)}")
    return sorted(found, key=_by_number)


def _by_number(file: Path) -> tuple[int, str]:
    digits = "".join(letter for letter in file.stem if letter.isdigit())
    return (int(digits) if digits else -1, file.name)
