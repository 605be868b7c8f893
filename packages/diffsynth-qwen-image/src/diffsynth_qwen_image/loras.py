"""Published LoRAs of Qwen-Image with which calls have other defaults. Light: no torch."""

from __future__ import annotations

import math

from diffsynth.spec import LoRASpec
from diffsynth_qwen_image.models import PIPELINE

_LIGHTNING = ("lightx2v/Qwen-Image-Lightning", "lightx2v/Qwen-Image-Edit-2511-Lightning")

LORAS = (
    *(
        LoRASpec(
            name=f"qwen-image-lightning-{steps}-steps",
            pipeline=PIPELINE,
            defaults={"num_inference_steps": steps, "cfg_scale": 1.0, "lightning_schedule": True},
            files=tuple(f"{model}:*-Lightning-{steps}steps-*.safetensors" for model in _LIGHTNING),
            names=(f"Qwen-Image*-Lightning-{steps}steps-*.safetensors",),
        )
        for steps in (4, 8)
    ),
    LoRASpec(
        name="qwen-image-distill-lora",
        pipeline=PIPELINE,
        defaults={"num_inference_steps": 15, "cfg_scale": 1.0},
        files=("DiffSynth-Studio/Qwen-Image-Distill-LoRA:model.safetensors",),
    ),
    LoRASpec(
        name="qwen-image-distill-dmd2",
        pipeline=PIPELINE,
        defaults={"num_inference_steps": 3, "cfg_scale": 1.0, "exponential_shift_mu": math.log(2.5)},
        files=("MusePublic/Qwen-Image-Distill:*.safetensors",),
    ),
)
