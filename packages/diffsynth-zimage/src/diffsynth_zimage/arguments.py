"""The arguments of a Z-Image call, for editors; a contract test holds them equal to the units, both ways."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from PIL import Image
from torch import Tensor

from diffsynth.runtime.request import OutputType, Step


class ImageArguments(TypedDict, total=False):
    """What to draw, how large, and what to start from."""

    negative_prompt: str | Sequence[str]
    input_image: Image.Image | Sequence[Image.Image] | Tensor | None
    denoising_strength: float
    height: int
    width: int
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
