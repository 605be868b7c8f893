"""Comparison of the contents of two files: pixels of images and videos, samples of sound, tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def compare_files(first: Path, second: Path) -> tuple[bool, str]:
    """Return whether two files have equal contents, and a text that says so, or how different they are.

    Args:
        first, second: images, videos, folders of frames, sound or tensors.

    Raises:
        CheckpointError: a file cannot be read.
    """
    total = changed = 0
    largest = squares = 0.0
    for one, other in zip_longest(_arrays(first), _arrays(second)):
        if one is None or other is None or one.shape != other.shape:
            return False, f"different: {first} has {_shape(one)} where {second} has {_shape(other)}"
        difference = abs(one.astype("float64") - other.astype("float64"))
        total, changed = total + difference.size, changed + int((difference != 0).sum())
        largest, squares = max(largest, float(difference.max(initial=0))), squares + float((difference**2).sum())
    what = "values" if first.suffix.lower() in (".safetensors", ".wav") else "levels of 0 to 255"
    if not changed:
        return True, f"equal: all {total} {what} of {first} and {second}"
    psnr = "" if what == "values" else f", PSNR {10 * math.log10(255**2 * total / squares):.1f} dB"
    share = f"{changed} of {total} {what} ({changed / total:.2%})"
    return False, f"different: {share} differ, by at most {largest:g}{psnr}"


def _arrays(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the arrays of a file: the levels of an image or of each frame, samples, or tensors by their names."""
    import numpy as np
    from PIL import Image

    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        yield from _tensors(path).values()
    elif suffix == ".wav":
        from diffsynth.core.data.media import read_audio

        yield read_audio(path)[0].numpy()
    else:
        from diffsynth.core.data.media import open_media

        media = open_media(path)
        for image in [media] if isinstance(media, Image.Image) else media:
            yield np.asarray(image)


def _shape(array: Any) -> str:
    return "nothing" if array is None else f"an array {'x'.join(map(str, array.shape)) or 'of one value'}"


def _tensors(path: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    from safetensors.torch import load_file

    return {name: tensor.double().numpy() for name, tensor in sorted(load_file(path).items())}
