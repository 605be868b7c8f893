"""Arguments of a FLUX.1 call, typed for editors; a contract test keeps them equal to what the units read."""

from __future__ import annotations

from diffsynth.runtime.image_units import ImageArguments
from diffsynth.runtime.inpainting import InpaintArguments
from diffsynth.runtime.request import LoopKeywords
from diffsynth_flux.flux1.features.control import ControlArguments
from diffsynth_flux.flux1.features.controlnet import ControlNetArguments
from diffsynth_flux.flux1.features.fill import FillArguments
from diffsynth_flux.flux1.features.ip_adapter import IPAdapterArguments
from diffsynth_flux.flux1.features.kontext import KontextArguments
from diffsynth_flux.flux1.features.redux import ReduxArguments


class FluxArguments(
    ImageArguments,
    KontextArguments,
    FillArguments,
    ControlArguments,
    ReduxArguments,
    ControlNetArguments,
    IPAdapterArguments,
    InpaintArguments,
    LoopKeywords,
    total=False,
):
    """All arguments of a call except the prompt.

    Args:
        embedded_guidance: Guidance that a distilled network takes as an input; larger values follow the prompt more
            closely. It is not `cfg_scale`.
        t5_sequence_length: Number of tokens that T5 reads of a prompt, at least 1 and at most 512; longer ones are cut.
        sigma_shift: Shift of the noise schedule, above 0 and at most 1000; larger values spend more steps at high noise
            levels. None means 3.
    """

    embedded_guidance: float
    t5_sequence_length: int
    sigma_shift: float | None
