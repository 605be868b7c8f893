"""Reading and writing video and sound, through PyAV, which is imported when it is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import LoadImage, cover
from diffsynth.errors import CorruptFile, NoFiles, Unavailable

Path_ = str | Path
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SOUND_RATE = 48_000


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
        video_file: Path_ | None = None,
        image_folder: Path_ | None = None,
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
        self._at, self._frame = -1, None

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
        return self._frame


def read_frames(path: Path_) -> Iterator[Image.Image]:
    """All frames of a video as RGB images, decoded one by one.

    Raises:
        NoFiles: there is no such file.
        CorruptFile: it has no video that can be read.
        Unavailable: PyAV is not installed.
    """
    with _opened(path, "video") as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield frame.to_image()


def frame_rate_of(path: Path_) -> Fraction:
    """Frames per second, as the file says; raises like `read_frames`."""
    with _opened(path, "video") as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise CorruptFile(f"{path} does not say how many frames it has per second")
        return Fraction(rate)


def count_frames(path: Path_) -> int:
    """Frames in a video; counted by its packets where the file does not say. Raises like `read_frames`."""
    with _opened(path, "video") as (container, stream):
        return int(stream.frames) or sum(1 for packet in container.demux(stream) if packet.size)


def read_audio(
    path: Path_, sample_rate: int | None = None, *, mono: bool = False
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
    av = _av()
    with _opened(path, "audio") as (container, stream):
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


def save_video(
    frames: Sequence[Image.Image | np.ndarray],
    save_path: Path_,
    fps: float,
    quality: float = 9,
    ffmpeg_params: Sequence[str] | None = None,
) -> None:
    """Write frames as a video; the suffix decides the container, H.264 is the codec.

    Args:
        frames: images, or arrays `h w 3` of uint8, of one size. An odd height or width is kept, at the cost of a
            pixel format (4:4:4) that some players do not show.
        save_path: of the file; missing folders are made.
        fps: frames per second.
        quality: 0 to 10; 10 is lossless.
        ffmpeg_params: options of the encoder, as "-name", "value" pairs: `["-preset", "slow"]`.

    Raises:
        ValueError: no frames, different sizes, or options that are no pairs.
        Unavailable: PyAV is not installed.
    """
    images = [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames]
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"{len(images)} frames of sizes {sorted(sizes)}; expected at least one frame, all of one size")
    if not 0 <= quality <= 10:
        raise ValueError(f"quality={quality}: expected 0 to 10")
    (size,) = sizes
    options = {"crf": str(round((1 - quality / 10) * 51)), **_encoder_options(ffmpeg_params or ())}
    Path(save_path).parent.mkdir(parents=True, exist_ok=True)
    with _av().open(str(save_path), "w") as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        for image in images:
            container.mux(stream.encode(_av().VideoFrame.from_image(image.convert("RGB"))))
        container.mux(stream.encode(None))


def save_frames(frames: Sequence[Image.Image], save_path: Path_) -> None:
    """Write frames into a folder as `0.png`, `1.png`, ..."""
    Path(save_path).mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        frame.save(Path(save_path) / f"{index}.png")


def merge_video_audio(video_path: Path_, audio_path: Path_) -> None:
    """Give a video file a sound track, in place. Pictures are not encoded again; the sound, in AAC, ends when they do.

    Raises:
        NoFiles: one of the files is not there.
        CorruptFile: one of them cannot be read. The video is unchanged then.
        Unavailable: PyAV is not installed.
    """
    video_path = Path(video_path)
    sound, rate = read_audio(audio_path, _SOUND_RATE)
    partial = video_path.with_name(f".{os.getpid()}.{video_path.name}")
    try:
        with _opened(video_path, "video") as (source, pictures), _av().open(str(partial), "w") as target:
            copied = target.add_stream_from_template(pictures)
            seconds = Fraction(count_frames(video_path)) / frame_rate_of(video_path)
            track = target.add_stream("aac", rate=rate, layout=_layout(sound))
            packets = _encoded(sound[:, : int(seconds * rate)], track, rate)
            for packet in source.demux(pictures):
                if packet.dts is None:
                    continue
                while packets and packets[0].dts * packets[0].time_base <= packet.dts * packet.time_base:
                    target.mux(packets.pop(0))
                packet.stream = copied
                target.mux(packet)
            target.mux(packets)
        os.replace(partial, video_path)
    finally:
        partial.unlink(missing_ok=True)


def save_video_with_audio(
    frames: Sequence[Image.Image | np.ndarray],
    save_path: Path_,
    audio_path: Path_,
    fps: float = 16,
    quality: float = 9,
    ffmpeg_params: Sequence[str] | None = None,
) -> None:
    """`save_video`, then `merge_video_audio`; raises what they raise."""
    save_video(frames, save_path, fps=fps, quality=quality, ffmpeg_params=ffmpeg_params)
    merge_video_audio(save_path, audio_path)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise Unavailable("video and sound need PyAV. Run: pip install av") from error
    return av


@contextmanager
def _opened(path: Path_, kind: str) -> Iterator[tuple[Any, Any]]:
    """A file and its first stream of a kind; what PyAV raises meanwhile names the file."""
    path, av = _existing(path), _av()
    try:
        with av.open(str(path)) as container:
            streams = getattr(container.streams, kind)
            if not streams:
                raise CorruptFile(f"{path} has no {kind} stream")
            yield container, streams[0]
    except av.FFmpegError as error:
        raise CorruptFile(f"{path} cannot be read as {kind}: {error}") from error


def _existing(path: Path_) -> Path:
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


def _encoder_options(parameters: Sequence[str]) -> dict[str, str]:
    names, values = parameters[::2], parameters[1::2]
    if len(names) != len(values) or not all(name.startswith("-") for name in names):
        raise ValueError(f'ffmpeg_params={list(parameters)}: expected pairs of "-name", "value" for the encoder')
    return {name.lstrip("-"): str(value) for name, value in zip(names, values, strict=True)}


def _layout(sound: Tensor) -> str:
    return "mono" if len(sound) == 1 else "stereo"


def _encoded(sound: Tensor, track: Any, rate: int) -> list[Any]:
    frame = _av().AudioFrame.from_ndarray(sound[:2].contiguous().numpy(), format="fltp", layout=_layout(sound))
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return [*track.encode(frame), *track.encode(None)]
