"""The arguments of a Z-Image call, for editors; a contract test holds them equal to the units, both ways."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from PIL import Image
from torch import Tensor

from diffsynth.runtime.acceleration.choice import StepCacheArgument
from diffsynth.runtime.acceleration.step_attention import AttentionArgument
from diffsynth.runtime.request import OutputType, Step


class ImageArguments(TypedDict, total=False):
    """What to draw, how large, and what to start from.

    Args:
        negative_prompt: what to steer away from; read when `cfg_scale` is not 1.
        input_image: image to start from: one, or one for each result.
        denoising_strength: in (0, 1]; how far back towards noise the input image goes. All steps run at any strength.
        height, width: pixels, at least 1; rounded up to a multiple of 16.
        tiled: the autoencoder works in overlapping tiles, blended: less memory, other pixels. None leaves it to the
            plan that keeps `vram_limit`: whole if that fits.
        tile_size: height and width of a tile, in latent pixels; one number is for both.
        tile_stride: from one tile to the next at most, in latent pixels; the rest of a tile is its overlap.
        rand_device: where noise is drawn; the CPU gives one picture on every machine.
        sigma_shift: warp of the schedule towards noise, above 0; None is 3.
    """

    negative_prompt: str | Sequence[str]
    input_image: Image.Image | Sequence[Image.Image] | Tensor | None
    denoising_strength: float
    height: int
    width: int
    tiled: bool | None
    tile_size: int | tuple[int, int]
    tile_stride: int | tuple[int, int]
    rand_device: str
    sigma_shift: float | None


class ZImageArguments(ImageArguments, total=False):
    """All of a call but the prompt."""

    num_inference_steps: int
    cfg_scale: float
    seed: int | Sequence[int] | None
    num_images: int
    output_type: OutputType
    on_step: Callable[[Step], None] | None
    cancel: threading.Event | None
    progress_bar_cmd: Callable[[Iterable[Any]], Iterable[Any]]
    step_cache: StepCacheArgument
    attention: AttentionArgument
