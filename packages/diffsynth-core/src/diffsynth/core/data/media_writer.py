"""Writing video, pictures and sound: H.264 and AAC through PyAV. A video file appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffsynth.core.data.media import Location, count_frames, frame_rate_of, opened, pyav, read_audio

_CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".flv")
_SOUND_RATE = 48_000


def save_video(
    frames: Sequence[Image.Image | np.ndarray],
    save_path: Location,
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
        quality: 0 to 10, which is H.264's crf 51 to 0.
        ffmpeg_params: options of the encoder, as "-name", "value" pairs: `["-preset", "slow"]`.

    Raises:
        ValueError: no frames, different sizes, options that are no pairs, or a suffix of no container.
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
    with _written(save_path) as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        for image in images:
            container.mux(stream.encode(pyav().VideoFrame.from_image(image.convert("RGB"))))
        container.mux(stream.encode(None))


def save_frames(frames: Sequence[Image.Image], save_path: Location) -> None:
    """Write frames into a folder as `0.png`, `1.png`, ..."""
    Path(save_path).mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        frame.save(Path(save_path) / f"{index}.png")


def merge_video_audio(video_path: Location, audio_path: Location) -> None:
    """Give a video file a sound track, in place. Pictures are not encoded again; the sound, in AAC, ends when they do.

    Raises:
        NoFiles: one of the files is not there.
        CorruptFile: one of them cannot be read. The video is unchanged then.
        Unavailable: PyAV is not installed.
    """
    sound, rate = read_audio(audio_path, _SOUND_RATE)
    seconds = Fraction(count_frames(video_path)) / frame_rate_of(video_path)
    with _written(video_path) as target, opened(video_path, "video") as (source, pictures):
        copied = target.add_stream_from_template(pictures)
        track = target.add_stream("aac", rate=rate, layout=_layout(sound))
        waiting = _encoded(sound[:, : int(seconds * rate)], track, rate)
        for packet in source.demux(pictures):
            if packet.dts is None:
                continue
            while waiting and waiting[0].dts * waiting[0].time_base <= packet.dts * packet.time_base:
                target.mux(waiting.pop(0))
            packet.stream = copied
            target.mux(packet)
        target.mux(waiting)


def save_video_with_audio(
    frames: Sequence[Image.Image | np.ndarray],
    save_path: Location,
    audio_path: Location,
    fps: float = 16,
    quality: float = 9,
    ffmpeg_params: Sequence[str] | None = None,
) -> None:
    """`save_video`, then `merge_video_audio`; raises what they raise."""
    save_video(frames, save_path, fps=fps, quality=quality, ffmpeg_params=ffmpeg_params)
    merge_video_audio(save_path, audio_path)


@contextmanager
def _written(path: Location) -> Iterator[Any]:
    """A container to write into; the file is replaced when all went well."""
    path, av = Path(path), pyav()
    if path.suffix.lower() not in _CONTAINERS:
        raise ValueError(f"{path} ends in {path.suffix or 'no suffix'!r}; expected one of {', '.join(_CONTAINERS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with av.open(str(partial), "w") as container:
            yield container
        os.replace(partial, path)
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be written: {error}; check ffmpeg_params and the frames' size") from error
    finally:
        partial.unlink(missing_ok=True)


def _encoder_options(parameters: Sequence[str]) -> dict[str, str]:
    names, values = parameters[::2], parameters[1::2]
    if len(names) != len(values) or not all(name.startswith("-") for name in names):
        raise ValueError(f'ffmpeg_params={list(parameters)}: expected pairs of "-name", "value" for the encoder')
    return {name.lstrip("-"): str(value) for name, value in zip(names, values, strict=True)}


def _layout(sound: Tensor) -> str:
    return "mono" if len(sound) == 1 else "stereo"


def _encoded(sound: Tensor, track: Any, rate: int) -> list[Any]:
    frame = pyav().AudioFrame.from_ndarray(sound[:2].contiguous().numpy(), format="fltp", layout=_layout(sound))
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return [*track.encode(frame), *track.encode(None)]
