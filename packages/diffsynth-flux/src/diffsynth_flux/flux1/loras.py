"""Published LoRAs of FLUX.1 with which calls have other defaults. Light: no torch."""

from __future__ import annotations

from diffsynth.spec import LoRASpec
from diffsynth_flux.flux1.models import PIPELINE

LORAS = (
    LoRASpec(
        name="flux.1-turbo-alpha",
        pipeline=PIPELINE,
        defaults={"num_inference_steps": 8, "embedded_guidance": 3.5},
        files=("alimama-creative/FLUX.1-Turbo-Alpha:diffusion_pytorch_model.safetensors",),
        names=("FLUX.1-Turbo-Alpha*.safetensors",),
    ),
)
