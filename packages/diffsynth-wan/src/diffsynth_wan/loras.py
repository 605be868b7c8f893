"""Published LoRAs of Wan with which calls have other defaults. Light: no torch."""

from __future__ import annotations

from diffsynth.spec import LoRASpec
from diffsynth_wan.models import PIPELINE

LORAS = (
    LoRASpec(
        name="wan-lightx2v-4-steps",
        pipeline=PIPELINE,
        defaults={"num_inference_steps": 4, "cfg_scale": 1.0},
        names=("*lightx2v*cfg_step_distill*.safetensors", "wan2.?_*_lora_*lightx2v_4step*.safetensors"),
    ),
)
"""The LoRAs of LightX2V for Wan 2.1 and 2.2, distilled to four steps without guidance, at the usual shift of 5."""
