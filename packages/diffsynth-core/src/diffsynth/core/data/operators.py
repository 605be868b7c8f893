"""Data operators: functions of one value, chained by `>>`, that turn a cell of a manifest into a training value."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.animation import Animation, is_animated
from diffsynth.core.data.color import WHITE, Color
from diffsynth.core.data.content import existing_file
from diffsynth.core.data.image import cover, read_image
from diffsynth.core.data.media import ROUNDING, Timeline, frame_rate_of, read_audio, read_timed_frames
from diffsynth.errors import CorruptFile, NoFiles

__all__ = [
    "DataProcessingOperator",
    "DataProcessingOperatorRaw",
    "DataProcessingPipeline",
    "FrameSamplerByRateMixin",
    "ImageCropAndResize",
    "LoadAudio",
    "LoadAudioWithTorchaudio",
    "LoadGIF",
    "LoadImage",
    "LoadPureAudioWithTorchaudio",
    "LoadTorchPickle",
    "LoadVideo",
    "RouteByAnimation",
    "RouteByExtensionName",
    "RouteByType",
    "SequencialProcess",
    "SequentialProcess",
    "ToAbsolutePath",
    "ToFloat",
    "ToInt",
    "ToList",
    "ToStr",
]

Sound = tuple[Float[Tensor, "channels samples"], int]
"""(fp32 samples in [-1, 1], sample rate)."""


class DataProcessingOperator:
    """Base class of data operators. Subclasses define `__call__`."""

    def __call__(self, data: Any) -> Any:
        """Return the processed value; the base class raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def __rshift__(self, following: DataProcessingOperator) -> DataProcessingPipeline:
        """Return a `DataProcessingPipeline` of this operator and the following one."""
        return DataProcessingPipeline([self, following])


class DataProcessingPipeline(DataProcessingOperator):
    """Operators applied in order; `first >> second` creates one.

    Args:
        operators: applied from first to last; nested pipelines are flattened.

    Raises:
        TypeError: an entry that is not callable.
    """

    def __init__(self, operators: list[DataProcessingOperator] | None = None) -> None:
        self.operators: list[DataProcessingOperator] = []
        for operator in operators or []:
            if not callable(operator):
                raise TypeError(f"{operator!r} is no data operator; expected a callable of one value")
            self.operators += operator.operators if isinstance(operator, DataProcessingPipeline) else [operator]

    def __call__(self, data: Any) -> Any:
        """Return the value after the last operator."""
        for operator in self.operators:
            data = operator(data)
        return data


class DataProcessingOperatorRaw(DataProcessingOperator):
    """Returns the value unchanged."""

    def __call__(self, data: Any) -> Any:
        """Return `data`."""
        return data


class ToInt(DataProcessingOperator):
    """Converts to int, for example the text of a csv cell."""

    def __call__(self, data: Any) -> int:
        """Return `int(data)`."""
        return int(data)


class ToFloat(DataProcessingOperator):
    """Converts to float, for example the text of a csv cell."""

    def __call__(self, data: Any) -> float:
        """Return `float(data)`."""
        return float(data)


class ToStr(DataProcessingOperator):
    """Converts to text.

    Args:
        none_value: the result for None.
    """

    def __init__(self, none_value: str = "") -> None:
        self.none_value = none_value

    def __call__(self, data: Any) -> str:
        """Return `str(data)`, or `none_value` for None."""
        return self.none_value if data is None else str(data)


class ToList(DataProcessingOperator):
    """Wraps the value in a list."""

    def __call__(self, data: Any) -> list[Any]:
        """Return `[data]`."""
        return [data]


class ToAbsolutePath(DataProcessingOperator):
    """Joins a path to a folder; URLs (`http://`, `https://`) are returned unchanged.

    Args:
        base_path: the folder; absolute paths in the data are kept.
    """

    def __init__(self, base_path: str | Path = "") -> None:
        self.base_path = base_path

    def __call__(self, data: str) -> str:
        """Return the path joined to the folder, as text; a URL is returned unchanged.

        Raises:
            TypeError: not a path, as for an empty cell.
        """
        if not isinstance(data, str | Path):
            raise TypeError(f"{data!r} is no path; expected a text")
        if str(data).startswith(("http://", "https://")):
            return str(data)
        return str(Path(self.base_path) / data)


class SequentialProcess(DataProcessingOperator):
    """Applies one operator to every item of a list.

    Args:
        operator: applied to each item; None leaves them unchanged.
    """

    def __init__(self, operator: Callable[[Any], Any] | None = None) -> None:
        self.operator = operator or DataProcessingOperatorRaw()

    def __call__(self, data: Sequence[Any]) -> list[Any]:
        """Return a list of the results of the operator for each item.

        Raises:
            TypeError: a text, whose items would be letters, or not a sequence.
        """
        if isinstance(data, str) or not isinstance(data, Sequence):
            raise TypeError(f"{data!r} is no list; route other types with RouteByType")
        return [self.operator(item) for item in data]


SequencialProcess = SequentialProcess
"""The spelling of DiffSynth-Studio."""


class RouteByExtensionName(DataProcessingOperator):
    """Selects an operator by the suffix of a file name.

    Args:
        operator_map: pairs of suffixes without dot ("jpg", "png") and operator, tried in order; None is any suffix.
    """

    def __init__(self, operator_map: Sequence[tuple[Sequence[str] | None, Callable[[Any], Any]]]) -> None:
        self.operator_map = list(operator_map)

    def __call__(self, data: str) -> Any:
        """Return the result of the first operator for the file's suffix, ignoring case.

        Raises:
            ValueError: no operator for the suffix.
        """
        # The query of a URL is not part of its suffix.
        suffix = Path(str(data).partition("?")[0]).suffix.removeprefix(".").lower()
        for suffixes, operator in self.operator_map:
            if suffixes is None or suffix in suffixes:
                return operator(data)
        known = ", ".join(name for suffixes, _ in self.operator_map for name in suffixes or ())
        raise ValueError(f"{str(data)!r} ends in {suffix or 'no suffix'!r}; expected one of {known}")


class RouteByAnimation(DataProcessingOperator):
    """Selects an operator by whether an image file is animated.

    Args:
        animated: for a file of at least two frames.
        still: for other files, and for URLs.
    """

    def __init__(self, animated: Callable[[Any], Any], still: Callable[[Any], Any]) -> None:
        self.animated, self.still = animated, still

    def __call__(self, data: str | Path) -> Any:
        """Return the result of the operator for the file at the path `data`.

        Raises:
            NoFiles: the file does not exist.
            CorruptFile: the file is an image that cannot be read.
        """
        if str(data).startswith(("http://", "https://")):
            return self.still(data)
        return (self.animated if is_animated(existing_file(data, "image")) else self.still)(data)


class RouteByType(DataProcessingOperator):
    """Selects an operator by the type of the value.

    Args:
        operator_map: pairs of type and operator, tried in order; None is any type.
    """

    def __init__(self, operator_map: Sequence[tuple[type | None, Callable[[Any], Any]]]) -> None:
        self.operator_map = list(operator_map)

    def __call__(self, data: Any) -> Any:
        """Return the result of the first operator for the value's type.

        Raises:
            ValueError: no operator for the type.
        """
        for kind, operator in self.operator_map:
            if kind is None or isinstance(data, kind):
                return operator(data)
        known = ", ".join(kind.__name__ for kind, _ in self.operator_map if kind is not None)
        raise ValueError(f"{data!r} is a {type(data).__name__}; expected one of {known}")


class LoadTorchPickle(DataProcessingOperator):
    """Loads a file of `torch.save`: tensors, numbers, texts, and lists and dicts of them, without running code.

    Args:
        map_location: device of the tensors; None is the device that they were saved from.
    """

    def __init__(self, map_location: torch.device | str | None = None) -> None:
        self.map_location = map_location

    def __call__(self, data: str | Path) -> Any:
        """Return the object that the file stores: tensors, plain values, and lists and dicts of them.

        Raises:
            NoFiles: the file does not exist.
            CorruptFile: not a pickle, or one with objects that only running its code could create.
        """
        if not Path(data).is_file():
            raise NoFiles(f"{data} does not exist")
        try:
            return torch.load(data, map_location=self.map_location, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptFile(f"{data} is not a pickle of tensors and plain values: {reason}") from None


class LoadImage(DataProcessingOperator):
    """Loads an image from a file or a URL.

    Args:
        convert_RGB: convert to three channels, transparent pixels over `background`; else mode and colours of the file
            are kept.
        convert_RGBA: convert to four channels; has precedence over `convert_RGB`.
        url_timeout: seconds to wait for a response.
        url_max_retries: number of download attempts; the pause between them grows by one second.
        background: colour below transparent pixels.
    """

    def __init__(
        self,
        convert_RGB: bool = True,  # noqa: N803
        convert_RGBA: bool = False,  # noqa: N803
        url_timeout: float = 30,
        url_max_retries: int = 3,
        background: Color = WHITE,
    ) -> None:
        self.mode = "RGBA" if convert_RGBA else "RGB" if convert_RGB else None
        self.url_timeout = url_timeout
        self.url_max_retries = url_max_retries
        self.background = background

    def __call__(self, data: str | Path) -> Image.Image:
        """Return the PIL image of a file or a URL; raises like `image.read_image`."""
        return read_image(
            data,
            self.mode,
            background=self.background,
            timeout=self.url_timeout,
            max_trials=self.url_max_retries,
        )


class ImageCropAndResize(DataProcessingOperator):
    """Resizes an image to a size that a network supports.

    Args:
        height: in pixels; with `width`, the image is scaled to cover this size and cropped about its centre.
        width: in pixels; given with `height`, or not at all.
        max_pixels: without `height` and `width`, images with more pixels are scaled down to at most this many.
        height_division_factor: without `height`, the height is rounded down to a multiple of this.
        width_division_factor: without `width`, the width is rounded down to a multiple of this.

    Raises:
        ValueError: only one of height and width.
    """

    def __init__(
        self,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int | None = None,
        height_division_factor: int = 1,
        width_division_factor: int = 1,
    ) -> None:
        if (height is None) != (width is None):
            raise ValueError(f"height={height} and width={width}: give both, or neither for the image's own")
        self.height, self.width = height, width
        self.max_pixels = max_pixels
        self.height_division_factor = height_division_factor
        self.width_division_factor = width_division_factor

    def get_height_width(self, image: Image.Image) -> tuple[int, int]:
        """Return a tuple (height, width), in pixels, of the size that `image` will have after resizing.

        Raises:
            ValueError: the image is smaller than the factors.
        """
        if self.height is not None and self.width is not None:
            return self.height, self.width
        height, width = image.height, image.width
        if self.max_pixels is not None and height * width > self.max_pixels:
            scale = (self.max_pixels / (height * width)) ** 0.5
            height, width = int(height * scale), int(width * scale)
        height -= height % self.height_division_factor
        width -= width % self.width_division_factor
        if not height or not width:
            raise ValueError(
                f"image of {image.width}x{image.height} pixels is smaller than the factors "
                f"{self.width_division_factor}x{self.height_division_factor}; give a height and a width"
            )
        return height, width

    def __call__(self, data: Image.Image) -> Image.Image:
        """Return the image scaled and cropped to the size of `get_height_width`."""
        return cover(data, *self.get_height_width(data))


class FrameSamplerByRateMixin:
    """Selects the first frames of a video.

    Args:
        num_frames: number of frames. A shorter video gives the largest number with remainder
            `time_division_remainder` modulo `time_division_factor`.
        time_division_factor: frames that a network compresses into one latent frame.
        time_division_remainder: frames that are encoded alone, for causal networks the first one.
        frame_rate: selected frames per second, if `fix_frame_rate`; else every frame is selected.
        fix_frame_rate: skip or repeat frames so that the video keeps its speed at `frame_rate`.
    """

    def __init__(
        self,
        num_frames: int = 81,
        time_division_factor: int = 4,
        time_division_remainder: int = 1,
        frame_rate: float = 24,
        fix_frame_rate: bool = False,
    ) -> None:
        self.num_frames = num_frames
        self.time_division_factor = time_division_factor
        self.time_division_remainder = time_division_remainder
        self.frame_rate = frame_rate
        self.fix_frame_rate = fix_frame_rate

    def take(self, frames: Iterable[Any], raw_frame_rate: Fraction) -> list[Any]:
        """Return a list of the first `num_frames` frames (at `frame_rate`, if fixed); a shorter video gives fewer, cut
        to a length that the time factor allows. `frames` is read no further than the last of them.

        Args:
            frames: all frames of the video, in order.
            raw_frame_rate: frames per second of the video.
        """
        return self.take_timed((float(index / raw_frame_rate), frame) for index, frame in enumerate(frames))

    def take_timed(self, timed_frames: Iterable[tuple[float, Any]]) -> list[Any]:
        """Return a list of the first `num_frames` frames as `take` does, those shown at the multiples of
        `1 / frame_rate` if it is fixed, of a video whose frames have their own times.

        Args:
            timed_frames: (time in seconds since the first frame, frame), in order; read no further than necessary.
        """
        if not self.fix_frame_rate:
            taken = [frame for _, frame in islice(timed_frames, self.num_frames)]
        else:
            taken = list(islice(_shown_at(timed_frames, Fraction(self.frame_rate)), self.num_frames))
        if len(taken) == self.num_frames:
            return taken
        while len(taken) > 1 and len(taken) % self.time_division_factor != self.time_division_remainder:
            taken.pop()
        return taken


class LoadVideo(DataProcessingOperator, FrameSamplerByRateMixin):
    """Loads the first frames of a video file as RGB images. Decoding stops at the last one.

    Args:
        num_frames, time_division_factor, time_division_remainder, frame_rate, fix_frame_rate: see
            `FrameSamplerByRateMixin`.
        frame_processor: applied to each frame; None leaves them unchanged.
    """

    def __init__(
        self,
        num_frames: int = 81,
        time_division_factor: int = 4,
        time_division_remainder: int = 1,
        frame_processor: Callable[[Image.Image], Any] | None = None,
        frame_rate: float = 24,
        fix_frame_rate: bool = False,
    ) -> None:
        FrameSamplerByRateMixin.__init__(
            self, num_frames, time_division_factor, time_division_remainder, frame_rate, fix_frame_rate
        )
        self.frame_processor = frame_processor

    def __call__(self, data: str | Path) -> list[Any]:
        """Return a list of the first frames of a video, each after `frame_processor`.

        Raises:
            NoFiles: the file does not exist.
            CorruptFile: the file has no video that can be read.
            Unavailable: PyAV is not installed.
        """
        return self._processed(read_timed_frames(data))

    def _processed(self, timed_frames: Iterable[tuple[float, Image.Image]]) -> list[Any]:
        taken = self.take_timed(timed_frames)
        return taken if self.frame_processor is None else [self.frame_processor(frame) for frame in taken]


class LoadGIF(LoadVideo):
    """Loads the first frames of a GIF or another animated image."""

    def __call__(self, data: str | Path) -> list[Any]:
        """Return a list of the first frames of an animated image, each after `frame_processor`.

        Raises:
            NoFiles: the file does not exist.
            CorruptFile: the file is not an image, or is cut off.
        """
        return self._processed((time, frame) for time, _, frame in Animation(data).frames())


class LoadAudio(DataProcessingOperator):
    """Loads the sound of a file as one channel.

    Args:
        sr: samples per second.
    """

    def __init__(self, sr: int = 16_000) -> None:
        self.sr = sr

    def __call__(self, data: str | Path) -> np.ndarray:
        """Return the samples of one channel as an fp32 array in [-1, 1]; raises like `media.read_audio`."""
        return read_audio(data, self.sr, mono=True)[0][0].numpy()


class LoadAudioWithTorchaudio(DataProcessingOperator, FrameSamplerByRateMixin):
    """Loads the sound of the frames that `LoadVideo` selects from the same file, cut or padded with silence.

    It reads by PyAV; the name is that of DiffSynth-Studio.

    Args:
        num_frames, time_division_factor, time_division_remainder, frame_rate, fix_frame_rate: as for `LoadVideo`.
    """

    def __call__(self, data: str | Path) -> Sound:
        """Return (samples `channels samples`, rate in Hz); raises like `media.read_audio` and `media.read_frames`."""
        rate = frame_rate_of(data)
        timeline = Timeline.of(data)
        frames = self.take_timed(zip(timeline.times, range(len(timeline.times)), strict=True))
        seconds = len(frames) / (Fraction(self.frame_rate) if self.fix_frame_rate else rate)
        sound, sample_rate = read_audio(data)
        return _with_length(sound, int(seconds * sample_rate)), sample_rate


class LoadPureAudioWithTorchaudio(DataProcessingOperator):
    """Loads the sound of an audio file. It reads by PyAV; the name is that of DiffSynth-Studio.

    Args:
        target_sample_rate: samples per second; None keeps that of the file.
        target_duration: in seconds, cut or padded with silence; None keeps that of the file.
    """

    def __init__(self, target_sample_rate: int | None = None, target_duration: float | None = None) -> None:
        self.target_sample_rate = target_sample_rate
        self.target_duration = target_duration

    def __call__(self, data: str | Path) -> Sound:
        """Return (samples `channels samples`, rate in Hz); raises like `media.read_audio`."""
        sound, sample_rate = read_audio(data, self.target_sample_rate)
        if self.target_duration is None:
            return sound, sample_rate
        return _with_length(sound, int(self.target_duration * sample_rate)), sample_rate


def _shown_at(timed_frames: Iterable[tuple[float, Any]], frame_rate: Fraction) -> Iterator[Any]:
    """Yield the frame shown at each multiple of `1 / frame_rate` seconds until the video ends; the last frame is taken
    to be as long as the one before it.
    """
    tick = 0
    last = None
    previous, step = 0.0, float(1 / frame_rate)
    for time, frame in timed_frames:
        while last is not None and tick / frame_rate < time - ROUNDING:
            yield last[0]
            tick += 1
        if last is not None:
            step = time - previous
        last, previous = (frame,), time
    while last is not None and tick / frame_rate < previous + step - ROUNDING:
        yield last[0]
        tick += 1


def _with_length(sound: Tensor, samples: int) -> Tensor:
    return F.pad(sound[:, :samples], (0, max(samples - sound.shape[1], 0)))
