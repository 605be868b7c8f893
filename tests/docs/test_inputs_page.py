"""Tests of the page on inputs: its block runs on files like those it names, and its numbers are those of the code."""

from __future__ import annotations

import re
import wave
from pathlib import Path

import pytest
from PIL import Image

from diffsynth import _env

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 90, 180)]
    frames[1].save("photo.jpg")
    frames[0].save("dance.gif", save_all=True, append_images=frames[1:], duration=250)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save("logo.png")
    with wave.open("voice.wav", "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(200))
    names = {"__name__": "block"}
    exec(block, names)
    if block != BLOCKS[0]:
        return
    assert names["over_grey"].getpixel((0, 0)) == (128, 128, 128)
    assert names["mask"].getpixel((0, 0)) == 0
    assert (len(names["clip"]), names["sample_rate"], names["samples"].shape) == (12, 8000, (1, 100))


def test_the_limit_is_that_of_the_code(monkeypatch):
    monkeypatch.delenv("DIFFSYNTH_MAX_IMAGE_PIXELS", raising=False)
    (stated,) = re.findall(r"more than ([\d,]+) pixels", PAGE)
    assert int(stated.replace(",", "")) == _env.max_image_pixels()
