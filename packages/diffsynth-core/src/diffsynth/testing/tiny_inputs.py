"""An image and a clip for calls of tiny models, from which functions of `ModelSpec.tiny_inputs` make arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def tiny_image(size: Mapping[str, int], *, turn: int = 0) -> Image.Image:
    """Return an RGB image of `size["width"]` x `size["height"]` pixels whose colours change from row to row, from
    column to column and with `turn`.

    Args:
        size: "height" and "width" in pixels.
        turn: number of the image, 0 or more; other numbers give other images.
    """
    from PIL import Image

    extent = (size["width"], size["height"])
    across = Image.linear_gradient("L").rotate(90).resize(extent)
    down = Image.linear_gradient("L").resize(extent)
    level = Image.new("L", extent, 37 * turn % 256)
    return Image.merge("RGB", (across, down, level))


def tiny_clip(size: Mapping[str, int]) -> list[Image.Image]:
    """Return a list of `size["num_frames"]` RGB images of `size["width"]` x `size["height"]` pixels, no two of them
    equal up to 256 frames.
    """
    return [tiny_image(size, turn=index) for index in range(size["num_frames"])]
