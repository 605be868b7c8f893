"""Writing of video, frames and sound, H.264, AAC and WAV, by PyAV. Files of video and sound are written atomically."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int16
from PIL import Image
from torch import Tensor

from diffsynth.core.arguments import check_number
from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.media import Location, count_frames, frame_rate, frame_rate_of, opened, pyav, read_audio
from diffsynth.core.data.video_frame import encoded_tags
from diffsynth.core.paths import expanded
from diffsynth.core.replacing import replacing
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".flv")
_SOUND_RATE = 48_000

_LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
"""Number of channels -> FFmpeg's name of the usual layout of their speakers."""

_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")

_CHUNK = 2**20
"""Samples that are passed to the encoder at once."""

Frames = Iterable[Image.Image | np.ndarray] | Tensor


def save_video(
    frames: Frames,
    save_path: Location,
    fps: float = 15,
    quality: float = 9,
    ffmpeg_params: Sequence[str] | None = None,
    *,
    comment: str | None = None,
) -> None:
    """Write `frames` to the file `save_path` as a video in H.264; the file's suffix selects the container format.

    Colours are encoded in limited range with the matrix of BT.709 from a height of 720 pixels, else BT.601, and the
    file is tagged with matrix, range, primaries and transfer, so that players need not guess.

    Args:
        frames: images, converted by `color.to_rgb`, or uint8 arrays `h w 3`, `h w 4` with alpha or `h w` of grey, of
            one size, consumed one by one, so a generator works. Or a tensor:
            `c t h w` or `1 c t h w` in [-1, 1], or uint8 `t h w 3`. An odd height or width is kept with the pixel
            format 4:4:4, which some players do not support.
        save_path: the file; missing folders are created.
        fps: frames per second.
        quality: 0 to 10, which is crf 51 to 0 of H.264.
        ffmpeg_params: options of the encoder, as "-name", "value" pairs: `["-preset", "slow"]`.
        comment: text for the metadata of the file.

    Raises:
        TypeError: a frame that is neither an image nor an array.
        ValueError: no frames, different sizes, an array or a tensor of another shape or dtype, values that are not
            finite, a frame rate that is no positive number, options that are no pairs, or an unknown suffix.
        Unavailable: PyAV is not installed.
    """
    check_number("quality", quality, least=0, most=10)
    rate = frame_rate(fps)
    options = {"crf": str(round((1 - quality / 10) * 51)), **_encoder_options(ffmpeg_params or ())}
    images = iter(images_of(frames))
    first = next(images, None)
    if first is None:
        raise ValueError("0 frames; expected at least one")
    with _written(save_path) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("h264", rate=rate, options=options)
        stream.width, stream.height = first.size
        stream.pix_fmt = "yuv444p" if first.width % 2 or first.height % 2 else "yuv420p"
        colors = encoded_tags(stream.codec_context, first.height)
        for index, image in enumerate(chain([first], images)):
            if image.size != first.size:
                raise ValueError(
                    f"frame {index} is {image.width}x{image.height}, the first one {first.width}x{first.height}; "
                    "expected frames of one size"
                )
            frame = pyav().VideoFrame.from_image(to_rgb(image)).reformat(format=stream.pix_fmt, **colors)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def save_audio(
    samples: Float[Tensor, "channels samples"], save_path: Location, sample_rate: int, *, comment: str | None = None
) -> None:
    """Write samples to the file `save_path` as WAV, 16-bit PCM: each is rounded to a multiple of 1 / 32768.

    Args:
        samples: floating-point tensor of 1 to 8 channels, on any device, in [-1, 1]. Values outside of this range are
            clipped, with a warning in the log.
        save_path: the file, ending in `.wav`; missing folders are created.
        sample_rate: samples per second of each channel, in Hz.
        comment: text for the metadata of the file.

    Raises:
        ValueError: a tensor of another dtype or shape, without samples, or with values that are not finite; a sample
            rate that is not a positive integer; another suffix.
        Unavailable: PyAV is not installed.
    """
    levels = _sound_levels(samples)
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate < 1:
        raise ValueError(f"sample_rate={sample_rate!r}: expected a positive integer, in Hz")
    layout = _LAYOUTS[len(levels)]
    with _written(save_path, (".wav",)) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("pcm_s16le", rate=sample_rate, layout=layout)
        for part in torch.split(levels, _CHUNK, dim=1):
            interleaved = rearrange(part, "c n -> 1 (n c)").contiguous().numpy()
            frame = pyav().AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
            frame.sample_rate = sample_rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_comment(path: Location, kind: str = "video") -> str | None:
    """Return the comment in the metadata of a media file as text, or None without one; raises like `read_frames`.

    Args:
        path: the file.
        kind: "video" or "audio", a stream that the file must have.
    """
    with opened(path, kind) as (container, _):
        names = {name.lower(): value for name, value in container.metadata.items()}  # Matroska has it in capitals
        return names.get("comment")


def save_frames(frames: Sequence[Image.Image], save_path: Location) -> None:
    """Write `frames` to the folder `save_path`, which is created if missing, as `0.png`, `1.png`, ...; those of a mode
    that PNG does not have are converted by `color.to_rgb`.
    """
    folder = expanded(save_path)
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        image = frame if frame.mode in _PNG_MODES else to_rgb(frame)
        with replacing(folder / f"{index}.png") as partial:
            image.save(partial)


def merge_video_audio(video_path: Location, audio_path: Location) -> None:
    """Replace the sound of the file `video_path`, in place, by that of `audio_path` in AAC (first two channels, 48
    kHz); frames are not encoded again, and sound longer than the video is cut.

    Raises:
        NoFiles: one of the files does not exist.
        CorruptFile: one of the files cannot be read. The video is then unchanged.
        Unavailable: PyAV is not installed.
    """
    sound, rate = read_audio(audio_path, _SOUND_RATE)
    seconds = Fraction(count_frames(video_path)) / frame_rate_of(video_path)
    with _written(video_path) as target, opened(video_path, "video") as (source, video):
        copied = target.add_stream_from_template(video)
        track = target.add_stream("aac", rate=rate, layout=_layout(sound))
        pending = _encoded(sound[:, : int(seconds * rate)], track, rate)
        for packet in source.demux(video):
            if packet.dts is None:
                continue
            while pending and pending[0].dts * pending[0].time_base <= packet.dts * packet.time_base:
                target.mux(pending.pop(0))
            packet.stream = copied
            target.mux(packet)
        target.mux(pending)


def save_video_with_audio(
    frames: Frames,
    save_path: Location,
    audio_path: Location,
    fps: float = 16,
    quality: float = 9,
    ffmpeg_params: Sequence[str] | None = None,
) -> None:
    """Write `frames` to the file `save_path` as a video in H.264 with the sound of the audio or video file
    `audio_path`.

    Arguments and errors are those of `save_video` and `merge_video_audio`.
    """
    read_audio(audio_path)  # raises before frames are generated and written
    save_video(frames, save_path, fps=fps, quality=quality, ffmpeg_params=ffmpeg_params)
    merge_video_audio(save_path, audio_path)


@contextmanager
def _written(path: Location, suffixes: Sequence[str] = _CONTAINERS) -> Iterator[Any]:
    """Context manager that yields a PyAV container to write to; its temporary file replaces `path` if no error occurs,
    and is deleted else.
    """
    path, av = expanded(path), pyav()
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} ends in {path.suffix or 'no suffix'!r}; expected one of {', '.join(suffixes)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial, av.open(str(partial), "w") as container:
            yield container
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be written: {error}; check ffmpeg_params and the frames' size") from error


def images_of(frames: Frames) -> Iterator[Image.Image]:
    """Return an iterator over the PIL images of frames, in the forms that `save_video` takes.

    Raises:
        TypeError, ValueError: see `save_video`.
    """
    if isinstance(frames, Tensor):
        frames = _arrays(frames)
    if isinstance(frames, Image.Image | str | os.PathLike) or not isinstance(frames, Iterable):
        raise TypeError(f"frames are {type(frames).__name__}; expected a sequence of images or arrays, or a tensor")
    return (_image(index, frame) for index, frame in enumerate(frames))


def _image(index: int, frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    if not isinstance(frame, np.ndarray):
        raise TypeError(f"frame {index} is {type(frame).__name__}; expected a PIL image or a uint8 array h w 3")
    if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or frame.shape[2:] not in ((), (3,), (4,)) or not frame.size:
        raise ValueError(
            f"frame {index} is an array of {frame.dtype} and shape {frame.shape}; expected uint8 of (h, w, 3)"
        )
    return Image.fromarray(frame)


def _arrays(video: Tensor) -> Iterator[np.ndarray]:
    """Return an iterator over the frames of a video tensor (in [-1, 1] or uint8) as uint8 numpy arrays `h w 3`."""
    if video.dtype == torch.uint8 and video.ndim == 4 and video.shape[3] == 3:
        return (frame.cpu().numpy() for frame in video)
    if not video.is_floating_point() or (*video.shape[:-3],) not in {(3,), (1, 3)}:
        raise ValueError(
            f"a tensor of {video.dtype} and shape {tuple(video.shape)}; expected (3, t, h, w) or (1, 3, t, h, w) in "
            "[-1, 1], or uint8 of (t, h, w, 3)"
        )
    frames = video.reshape(video.shape[-4:]).unbind(dim=1)
    return (_levels(index, frame) for index, frame in enumerate(frames))


def _levels(index: int, frame: Float[Tensor, "c h w"]) -> np.ndarray:
    values = frame.detach().float().cpu()
    if not torch.isfinite(values).all():
        raise ValueError(f"frame {index} has values that are not finite; expected values in [-1, 1]")
    return rearrange(((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "c h w -> h w c").numpy()


def _sound_levels(samples: Tensor) -> Int16[Tensor, "channels samples"]:
    """Return samples as int16 on the CPU: 32768 times their value, rounded and clipped."""
    if not samples.is_floating_point() or samples.ndim != 2 or len(samples) not in _LAYOUTS or not samples.numel():
        raise ValueError(
            f"a tensor of {samples.dtype} and shape {tuple(samples.shape)}; expected (channels, samples) of floating "
            f"point in [-1, 1], with 1 to {len(_LAYOUTS)} channels and at least one sample"
        )
    values = samples.detach().to("cpu", torch.float32)
    peak = float(values.abs().max())
    if not math.isfinite(peak):
        raise ValueError("sound with values that are not finite; expected samples in [-1, 1]")
    if peak > 1:
        logger.warning("sound with a peak of %.3f is clipped to [-1, 1]", peak)
    return (values * 32768).round().clamp(-32768, 32767).to(torch.int16)


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
