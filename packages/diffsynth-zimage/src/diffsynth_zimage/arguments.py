"""Arguments of a Z-Image call, typed for editors; a contract test keeps them equal to what the units read."""

from __future__ import annotations

from diffsynth.runtime.image_to_lora import ImageToLoRAArguments
from diffsynth.runtime.image_units import ImageArguments
from diffsynth.runtime.inpainting import InpaintArguments
from diffsynth.runtime.request import LoopKeywords
from diffsynth_zimage.features.controlnet import ControlNetArguments
from diffsynth_zimage.features.edit import EditArguments


class ZImageArguments(
    ImageArguments,
    ControlNetArguments,
    EditArguments,
    InpaintArguments,
    ImageToLoRAArguments,
    LoopKeywords,
    total=False,
):
    """All arguments of a call except the prompt.

    Args:
        sigma_shift: Shift of the noise schedule, above 0 and at most 1000; larger values spend more steps at high noise
            levels. None means 3.
    """

    sigma_shift: float | None
