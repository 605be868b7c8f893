"""The models of Qwen-Image: their files, defaults and tiny configs. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsynth.spec import ModelSpec, TrainingSpec
from diffsynth_qwen_image.checkpoints import BASE, BASE_2512, DISTILL_FULL, LORA_TARGETS

PIPELINE = "diffsynth_qwen_image.pipeline:QwenImagePipeline"

TINY = {
    "dit": {"dim": 256, "n_heads": 2, "prompt_dim": 64, "ffn_dim": 256, "axes_dims": (16, 56, 56)},
    "text_encoder": {"hidden_size": 64, "vocab_size": 320},
}
"""Config fields of the tiny networks; the transformer's head dimension and RoPE axes are the published ones."""


def _model(
    hub_id: str,
    description: str,
    *,
    file: str = "transformer/diffusion_pytorch_model*.safetensors",
    defaults: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Return the `ModelSpec` of a model with its own transformer `file` and the other components of Qwen-Image."""
    return ModelSpec(
        name=hub_id.rpartition("/")[2].lower(),
        hub_id=hub_id,
        family="qwen-image",
        task="text-to-image",
        pipeline=PIPELINE,
        components={
            "dit": f"{hub_id}:{file}",
            "text_encoder": f"{BASE}:text_encoder/model*.safetensors",
            "vae": f"{BASE}:vae/diffusion_pytorch_model.safetensors",
        },
        processors={"tokenizer": f"{BASE}:tokenizer/"},
        tiny=TINY,
        defaults=defaults or {"num_inference_steps": 40},
        license="Apache-2.0",
        paper="arXiv:2508.02324",
        description=description,
    )


MODELS = (
    _model(BASE, "20B; renders text"),
    _model(BASE_2512, "20B, weights of December 2025"),
    _model(
        DISTILL_FULL,
        "20B, distilled to 15 steps without guidance",
        file="diffusion_pytorch_model*.safetensors",
        defaults={"num_inference_steps": 15, "cfg_scale": 1.0},
    ),
)

TRAINING = (
    TrainingSpec(
        pipeline=PIPELINE,
        trainable=("dit", "text_encoder", "vae"),
        lora_targets={"dit": LORA_TARGETS},
        data={"prompt": "prompt", "image": "input_image"},
        schedule="diffsynth.sampling.schedule:qwen_image_sigmas",
    ),
)
