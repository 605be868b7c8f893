"""Operators for short clips: the first frames of a video or GIF, as many as a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError

from diffsynth.core.data.media import frame_rate_of, read_frames
from diffsynth.core.data.operator_base import DataProcessingOperator
from diffsynth.errors import CorruptFile, NoFiles


class FrameSamplerByRateMixin:
    """Which frames of a stream are taken.

    Args:
        num_frames: how many; fewer if the clip is short: then as many as leave `time_division_remainder` when divided
            by `time_division_factor`.
        time_division_factor: frames that a network folds into one latent frame.
        time_division_remainder: frames that stand alone, the first one of a causal network.
        frame_rate: of the taken frames, per second, if `fix_frame_rate`; else every frame is taken.
        fix_frame_rate: frames are skipped or repeated so that the clip keeps its speed at `frame_rate`.
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
        """The taken frames; reads no further than the last of them.

        Args:
            frames: of the whole stream, in order.
            raw_frame_rate: of the stream, per second.
        """
        step = raw_frame_rate / Fraction(self.frame_rate) if self.fix_frame_rate else Fraction(1)
        taken: list[Any] = []
        for index, frame in enumerate(frames):
            while len(taken) < self.num_frames and len(taken) * step // 1 == index:
                taken.append(frame)
            if len(taken) == self.num_frames:
                return taken
        while len(taken) > 1 and len(taken) % self.time_division_factor != self.time_division_remainder:
            taken.pop()
        return taken


class LoadVideo(DataProcessingOperator, FrameSamplerByRateMixin):
    """The first frames of a video file, as RGB images. Reading stops at the last one.

    Args:
        num_frames, time_division_factor, time_division_remainder, frame_rate, fix_frame_rate: see
            `FrameSamplerByRateMixin`.
        frame_processor: applied to each frame; None leaves them as they are.
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
        """The processed frames.

        Raises:
            NoFiles: there is no such file.
            CorruptFile: it has no video that can be read.
            Unavailable: PyAV is not installed.
        """
        rate = frame_rate_of(data) if self.fix_frame_rate else Fraction(1)
        return self._processed(read_frames(data), rate)

    def _processed(self, frames: Iterable[Image.Image], raw_frame_rate: Fraction) -> list[Any]:
        taken = self.take(frames, raw_frame_rate)
        return taken if self.frame_processor is None else [self.frame_processor(frame) for frame in taken]


class LoadGIF(LoadVideo):
    """The first frames of a GIF or another animated image. Its first frame's duration stands for all."""

    def __call__(self, data: str | Path) -> list[Any]:
        """The processed frames.

        Raises:
            NoFiles: there is no such file.
            CorruptFile: it is no image.
        """
        if not Path(data).is_file():
            raise NoFiles(f"{data} does not exist")
        try:
            with Image.open(data) as animation:
                # Viewers take 0 and nothing as a tenth of a second.
                milliseconds = animation.info.get("duration") or 100
                frames = (frame.convert("RGB") for frame in ImageSequence.Iterator(animation))
                return self._processed(frames, Fraction(1000) / Fraction(milliseconds))
        except UnidentifiedImageError as error:
            raise CorruptFile(f"{data} is not an image that can be read: {error}") from error
