"""Arguments of a Qwen-Image call, typed for editors; a contract test keeps them equal to what the units read."""

from __future__ import annotations

from collections.abc import Sequence

from diffsynth.runtime.image_to_lora import ImageToLoRAArguments
from diffsynth.runtime.image_units import ImageArguments
from diffsynth.runtime.inpainting import InpaintArguments
from diffsynth.runtime.kv_cache import KVCacheArguments
from diffsynth.runtime.request import LoopKeywords
from diffsynth_qwen_image.features.blockwise_controlnet import BlockwiseControlNetArguments
from diffsynth_qwen_image.features.context import ContextArguments
from diffsynth_qwen_image.features.controlnet import ControlNetArguments
from diffsynth_qwen_image.features.edit import EditArguments
from diffsynth_qwen_image.features.eligen import EntityArguments
from diffsynth_qwen_image.features.layers import LayerArguments


class QwenImageArguments(
    ImageArguments,
    ContextArguments,
    EditArguments,
    EntityArguments,
    ImageToLoRAArguments,
    KVCacheArguments,
    LayerArguments,
    InpaintArguments,
    ControlNetArguments,
    BlockwiseControlNetArguments,
    LoopKeywords,
    total=False,
):
    """All arguments of a call except the prompt.

    Args:
        exponential_shift_mu: Logarithm of the shift of the noise schedule, in [-80, 80]; larger values spend more steps
            at high noise levels. None lets it grow with the size of the image.
        lightning_schedule: Whether the noise levels are those of Qwen-Image-Lightning, for networks and LoRAs that are
            distilled to few steps: the same shift for every size, and a last level that is not lowered to 0.02.
        layered_schedule: Whether the shift grows with the square root of the number of tokens, as the authors of
            Qwen-Image-Layered sample it.
        sigmas: Noise levels of the steps in (0, 1], falling, in place of those of the schedule; the last step goes to
            0, which is not listed. None uses the schedule.
    """

    exponential_shift_mu: float | None
    lightning_schedule: bool
    layered_schedule: bool
    sigmas: Sequence[float] | None
