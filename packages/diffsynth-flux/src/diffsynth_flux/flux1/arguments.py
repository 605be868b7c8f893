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
            levels. None means 3, or that of the original schedule.
        original_schedule: Whether the noise levels are those of the code of Black Forest Labs, which diffusers has,
            too: from 1 in equal steps, shifted by the size of the image, or not shifted for FLUX.1-schnell. Else they
            are those of DiffSynth-Studio. None is True for a network without the guidance input, such as schnell's.
    """

    embedded_guidance: float
    t5_sequence_length: int
    sigma_shift: float | None
    original_schedule: bool | None


_ADAPTER = "this version recognises the files of {}, and does not run them"

OTHER_ARGUMENTS = {
    "guidance_scale": (
        "embedded_guidance is the scale that a distilled network takes as input, cfg_scale that of two branches"
    ),
    "tea_cache_l1_thresh": (
        "step_cache='tea:threshold=0.6,model=flux.1-dev' takes its place, with the threshold that it had"
    ),
    **dict.fromkeys(
        ("eligen_entity_prompts", "eligen_entity_masks", "eligen_enable_on_negative", "eligen_enable_inpaint"),
        _ADAPTER.format("EliGen"),
    ),
    **dict.fromkeys(("infinityou_id_image", "infinityou_guidance"), _ADAPTER.format("InfiniteYou")),
    **dict.fromkeys(
        (f"flex_{name}" for name in ("inpaint_image", "inpaint_mask", "control_image", "control_strength")),
        _ADAPTER.format("Flex.2"),
    ),
    "flex_control_stop": _ADAPTER.format("Flex.2"),
    "value_controller_inputs": _ADAPTER.format("AttriCtrl"),
    "step1x_reference_image": f"{_ADAPTER.format('Step1X-Edit')}; kontext_images edits an image with FLUX.1-Kontext",
    "nexus_gen_reference_image": _ADAPTER.format("Nexus-Gen"),
    **dict.fromkeys(("lora_encoder_inputs", "lora_encoder_scale"), _ADAPTER.format("the LoRA encoder")),
    **dict.fromkeys(
        (f"insert_anything_{name}" for name in ("source_image", "source_mask", "ref_image", "ref_mask")),
        f"{_ADAPTER.format('Insert-Anything')}; flux_fill_image and flux_fill_mask replace a part of an image",
    ),
}
"""Argument of DiffSynth-Studio that the pipeline does not take -> what takes its place."""
