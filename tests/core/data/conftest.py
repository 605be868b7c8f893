"""Small pictures, clips and sounds, made on the spot."""

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def frames():
    """Ten pictures of 48x32 pixels, each of one grey: 0, 25, ... 225."""
    return [Image.new("RGB", (48, 32), (25 * index,) * 3) for index in range(10)]


def write_tone(path: Path, *, seconds: float, rate: int = 8000, channels: int = 1) -> Path:
    """A wave file of 440 Hz; every channel is half as loud as the one before."""
    time = np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * 440 * time) * 0.5 ** (channel + 1) for channel in range(channels)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.stack(tones, axis=1) * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture
def tone(tmp_path):
    return lambda name="tone.wav", **settings: write_tone(tmp_path / name, **settings)


def greys(pictures) -> list[int]:
    """The mean level of each picture."""
    return [round(float(np.asarray(picture, dtype=float).mean())) for picture in pictures]


@pytest.fixture
def levels():
    return greys
