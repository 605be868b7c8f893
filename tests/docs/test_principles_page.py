"""Tests of the page on principles: its blocks run in order, and its images are those of the tool."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import torch

import diffsynth
from documented import blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "principles.md").read_text(encoding="utf-8")
IMAGES = [ROOT / "docs" / name for name in re.findall(r"\]\((images/principles-[\w.-]+)\)", PAGE)]


def tool():
    spec = importlib.util.spec_from_file_location("principles_images", ROOT / "tools" / "principles_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_blocks_run_in_order():
    names = {"__name__": "block"}
    for _, language, text in blocks(PAGE):
        assert language == "python"
        exec(text, names)
    assert names["loss"] > 0


def test_the_images_are_there_and_small():
    assert len(IMAGES) == 4
    assert sum(image.stat().st_size for image in IMAGES) < 150_000
    assert sorted(IMAGES) == sorted((ROOT / "docs" / "images").glob("principles-*"))


def test_the_tool_makes_the_images():
    """The chart to the letter; the sheets with fewer and smaller images."""
    module = tool()
    assert (ROOT / "docs" / "images" / "principles-schedules.svg").read_text(encoding="utf-8") == module.schedules()
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)
    small = pipe.named("z-image-nano", {"height": 32, "width": 32, "num_inference_steps": 1})
    assert module.noise_to_image(small, num_steps=2).size == (84 + 2 * 100, 18 + 3 * 100)
    assert module.guidance(small, scales=(1, 3)).size == (84 + 2 * 100, 18 + 2 * 100)
    assert module.steps(small, counts=(1,)).size == (84 + 100, 18 + 2 * 100)


def test_the_table_names_modules():
    modules = re.findall(r"`(diffsynth(?:_train)?(?:\.\w+)+)` \|$", PAGE, flags=re.MULTILINE)
    assert len(modules) >= 8
    assert all(importlib.util.find_spec(name) for name in modules)
