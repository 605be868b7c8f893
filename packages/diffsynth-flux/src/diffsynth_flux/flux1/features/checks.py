"""Checks of the images that features take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image


def check_images(name: str, values: Mapping[str, Any]) -> None:
    """Raise TypeError unless an argument is None, a PIL image or a list of PIL images.

    Args:
        name: of the argument.
        values: the arguments of a call.

    Raises:
        TypeError: it is something else.
    """
    value = values[name]
    images = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"{name}={image!r:.80}: expected a PIL image, or a list of them")
