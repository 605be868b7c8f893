"""Arguments of a FLUX.2 call, typed for editors; a contract test keeps them equal to what the units read."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.image_units import ImageArguments
from diffsynth.runtime.inpainting import InpaintArguments
from diffsynth.runtime.kv_cache import KVCacheArguments
from diffsynth.runtime.request import LoopKeywords
from diffsynth_flux.flux2.features.edit import EditArguments
from diffsynth_flux.flux2.features.reference_cache import ReferenceCacheArguments
from diffsynth_flux.flux2.features.template import TemplateArguments


class Flux2Arguments(
    ImageArguments,
    EditArguments,
    ReferenceCacheArguments,
    KVCacheArguments,
    TemplateArguments,
    InpaintArguments,
    LoopKeywords,
    total=False,
):
    """All arguments of a call except the prompt.

    Args:
        embedded_guidance: Guidance scale that a distilled network (FLUX.2-dev) takes as input; larger values follow
            the prompt more closely. FLUX.2-klein takes none.
        tile_size: Height and width of a tile in units of 8 pixels; one number sets both.
        tile_stride: Largest distance between neighbouring tiles in units of 8 pixels; the rest of a tile is overlap.
        initial_noise: Noise to start from, in place of that of `seed`: packed latents `1 128 h/16 w/16`, or one for
            each result.
    """

    embedded_guidance: float
    initial_noise: Float[Tensor, "#b c h w"] | None


OTHER_ARGUMENTS = {
    "guidance_scale": (
        "embedded_guidance is the scale that a distilled network takes as input, cfg_scale that of two branches"
    ),
    "t5_sequence_length": "FLUX.2 has no T5; its text encoder reads 512 tokens of every prompt. Leave it out",
    **dict.fromkeys(
        ("template_inputs", "negative_template_inputs"),
        "template models are not run; kv_cache, lora and extra_text_embedding take what they return",
    ),
}
"""Argument of DiffSynth-Studio, or of its manual, that the pipeline does not take -> what takes its place."""
