"""Operators for sound. They read by PyAV; the names are those that older scripts use."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.data.clip import FrameSamplerByRateMixin
from diffsynth.core.data.media import count_frames, frame_rate_of, read_audio
from diffsynth.core.data.operator_base import DataProcessingOperator

Sound = tuple[Float[Tensor, "channels samples"], int]
"""fp32 samples in [-1, 1] and their rate."""


class LoadAudio(DataProcessingOperator):
    """The sound of a file as one channel.

    Args:
        sr: samples per second.
    """

    def __init__(self, sr: int = 16_000) -> None:
        self.sr = sr

    def __call__(self, data: str | Path) -> np.ndarray:
        """fp32 samples in [-1, 1]; raises like `media.read_audio`."""
        return read_audio(data, self.sr, mono=True)[0][0].numpy()


class LoadAudioWithTorchaudio(DataProcessingOperator, FrameSamplerByRateMixin):
    """The sound that goes with the frames `LoadVideo` takes of the same file: cut, or filled with silence, to match.

    Args:
        num_frames, time_division_factor, time_division_remainder, frame_rate, fix_frame_rate: as for `LoadVideo`.
    """

    def __call__(self, data: str | Path) -> Sound:
        """Raises like `media.read_audio` and `media.read_frames`."""
        rate = frame_rate_of(data)
        frames = self.take(range(count_frames(data)), rate)
        seconds = len(frames) / (Fraction(self.frame_rate) if self.fix_frame_rate else rate)
        sound, sample_rate = read_audio(data)
        return _of_length(sound, int(seconds * sample_rate)), sample_rate


class LoadPureAudioWithTorchaudio(DataProcessingOperator):
    """The sound of an audio file.

    Args:
        target_sample_rate: samples per second; None keeps the file's.
        target_duration: in seconds, cut or filled with silence; None keeps the file's.
    """

    def __init__(self, target_sample_rate: int | None = None, target_duration: float | None = None) -> None:
        self.target_sample_rate = target_sample_rate
        self.target_duration = target_duration

    def __call__(self, data: str | Path) -> Sound:
        """Raises like `media.read_audio`."""
        sound, sample_rate = read_audio(data, self.target_sample_rate)
        if self.target_duration is None:
            return sound, sample_rate
        return _of_length(sound, int(self.target_duration * sample_rate)), sample_rate


def _of_length(sound: Tensor, samples: int) -> Tensor:
    return F.pad(sound[:, :samples], (0, max(samples - sound.shape[1], 0)))
