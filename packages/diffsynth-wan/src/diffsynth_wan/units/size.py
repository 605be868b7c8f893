"""Size of the video of a call, rounded to what the autoencoder and the transformer take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsynth.runtime.feature import Configs
from diffsynth.runtime.image_units import round_up

PATCH = 2
"""Side of a token of the transformer, in latent pixels."""


def rounded_shape(
    height: int, width: int, num_frames: int, *, vae_factor: int, time_factor: int
) -> tuple[int, int, int]:
    """Return the ints (height, width, frames): pixels rounded up to multiples of `PATCH * vae_factor`, frames rounded
    up to `k * time_factor + 1`.

    Raises:
        ValueError: one of the sizes is no positive integer.
    """
    for name, value in (("height", height), ("width", width), ("num_frames", num_frames)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a positive integer")
    multiple = PATCH * vae_factor
    return round_up(height, multiple), round_up(width, multiple), round_up(num_frames - 1, time_factor) + 1


def video_size(configs: Configs, values: Mapping[str, Any]) -> dict[str, int]:
    """Return a dict `height`, `width`, `num_frames` -> int of the call's video: rounded, if the autoencoder is loaded.

    Args:
        configs: role -> config.
        values: arguments of the call.

    Raises:
        ValueError: one of the sizes is no positive integer.
    """
    names, vae = ("height", "width", "num_frames"), configs["vae"]
    sizes = tuple(values[name] for name in names)
    if vae is not None:
        sizes = rounded_shape(*sizes, vae_factor=vae.factor, time_factor=vae.time_factor)
    return dict(zip(names, sizes, strict=True))
