"""Arguments of a FLUX.1 call, typed for editors; a contract test keeps them equal to what the units read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from PIL import Image
from torch import Tensor

from diffsynth.runtime.acceleration import AttentionArgument, StepCacheArgument
from diffsynth.runtime.argument_types import RandDevice
from diffsynth.runtime.guidance import GuidanceArgument
from diffsynth.runtime.inpainting import InpaintArguments
from diffsynth.runtime.request import OutputType, Step
from diffsynth_flux.flux1.features.control import ControlArguments
from diffsynth_flux.flux1.features.controlnet import ControlNetArguments
from diffsynth_flux.flux1.features.fill import FillArguments
from diffsynth_flux.flux1.features.kontext import KontextArguments
from diffsynth_flux.flux1.features.redux import ReduxArguments


class ImageArguments(TypedDict, total=False):
    """Negative prompt, guidance, input image, size, and how the image is computed.

    Args:
        negative_prompt: Text that guidance steers away from; used only if `cfg_scale` is not 1.
        embedded_guidance: Guidance that a distilled network takes as an input; larger values follow the prompt more
            closely. It is not `cfg_scale`.
        t5_sequence_length: Number of tokens that T5 reads of a prompt, at least 1 and at most 512; longer ones are cut.
        input_image: Image to start from, or a list of one per result; None starts from pure noise.
        denoising_strength: Noise level that the input image is raised to, in (0, 1]; 1 ignores the input. The number
            of steps stays the same.
        height, width: Size of the image in pixels, at least 1; rounded up to a multiple of 16.
        tiled: Whether the autoencoder works in overlapping tiles, which takes less memory and gives other pixels. None
            uses tiles only if the memory plan for `vram_limit` needs them.
        tile_size: Height and width of a tile in latent pixels; one number sets both.
        tile_stride: Largest distance between neighbouring tiles in latent pixels; the rest of a tile is overlap.
        rand_device: Device on which the initial noise is generated; "cpu" gives the same noise on every machine.
        sigma_shift: Shift of the noise schedule, above 0 and at most 1000; larger values spend more steps at high noise
            levels. None means 3.
    """

    negative_prompt: str | Sequence[str]
    embedded_guidance: float
    t5_sequence_length: int
    input_image: Image.Image | Sequence[Image.Image] | Tensor | None
    denoising_strength: float
    height: int
    width: int
    tiled: bool | None
    tile_size: int | tuple[int, int]
    tile_stride: int | tuple[int, int]
    rand_device: RandDevice
    sigma_shift: float | None


class FluxArguments(
    ImageArguments,
    KontextArguments,
    FillArguments,
    ControlArguments,
    ReduxArguments,
    ControlNetArguments,
    InpaintArguments,
    total=False,
):
    """All arguments of a call except the prompt."""

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
    solver: str
    guidance: GuidanceArgument
