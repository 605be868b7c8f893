"""FLUX.1's models, which users load by name. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffsynth.spec import ModelSpec, TeaCacheSpec, TrainingSpec
from diffsynth_flux.flux1.checkpoints import LORA_TARGETS

PIPELINE = "diffsynth_flux.flux1.pipeline:FluxImagePipeline"
DEV = "black-forest-labs/FLUX.1-dev"
LICENSE = "FLUX.1 [dev] Non-Commercial License"

CONTEXT_DIM, POOLED_DIM = 64, 128
"""Widths of the tiny text encoders."""

TINY_DIT = {"dim": 128, "n_heads": 1, "n_double_blocks": 1, "context_dim": CONTEXT_DIM, "pooled_dim": POOLED_DIM}
"""Config fields of the tiny transformer; the head dimension is the published one."""

TINY_ENCODERS = {
    "text_encoder_1": {"hidden_size": POOLED_DIM, "vocab_size": 320},
    "text_encoder_2": {"hidden_size": CONTEXT_DIM, "vocab_size": 320, "num_buckets": 32},
}

TINY_REDUX = {"image_embedder": {"context_dim": CONTEXT_DIM}}

TINY_IP_ADAPTER = {"ipadapter": {"context_dim": CONTEXT_DIM}}

TEA_CACHE = TeaCacheSpec(
    coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), signal="module:img_norm1"
)
"""Published coefficients of TeaCache (Liu et al. 2024, arXiv:2411.19108)."""


def _model(
    hub_id: str,
    file: str,
    description: str,
    *,
    encoders: str = DEV,
    task: str = "text-to-image",
    defaults: Mapping[str, Any] | None = None,
    license_name: str = LICENSE,
    tiny: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    tiny_inputs: str = "",
    more: Mapping[str, str] | None = None,
) -> ModelSpec:
    """Return the `ModelSpec` of a FLUX.1 model: its transformer, and text encoders, autoencoder and tokenizers.

    Args:
        hub_id, description, task, defaults, license_name: fields of `ModelSpec`.
        file: the transformer, in the model's repository, or `REPOSITORY:FILE`.
        encoders: repository of the text encoders, their tokenizers and the autoencoder.
        tiny: role -> config fields of the tiny networks that the model does not share with FLUX.1-dev.
        tiny_inputs: name of the function in `diffsynth_flux.flux1.tiny` that makes the inputs that the model needs.
        more: role -> file in the model's repository, or `REPOSITORY:FILE`, of further networks.
    """
    return ModelSpec(
        name=hub_id.rpartition("/")[2].lower(),
        hub_id=hub_id,
        family="flux-1",
        task=task,
        pipeline=PIPELINE,
        components={
            "dit": file if ":" in file else f"{hub_id}:{file}",
            "text_encoder_1": f"{encoders}:text_encoder/model.safetensors",
            "text_encoder_2": f"{encoders}:text_encoder_2/*.safetensors",
            "vae": f"{encoders}:ae.safetensors",
            **{role: path if ":" in path else f"{hub_id}:{path}" for role, path in (more or {}).items()},
        },
        processors={"tokenizer_1": f"{encoders}:tokenizer/", "tokenizer_2": f"{encoders}:tokenizer_2/"},
        defaults=dict(defaults or {}),
        license=license_name,
        description=description,
        tiny={**TINY_ENCODERS, **tiny, "dit": TINY_DIT | tiny.get("dit", {})},
        tiny_inputs=f"diffsynth_flux.flux1.tiny:{tiny_inputs}" if tiny_inputs else "",
        tea_cache=TEA_CACHE,
    )


MODELS = (
    _model(DEV, "flux1-dev.safetensors", "12B, guidance-distilled"),
    _model(
        "black-forest-labs/FLUX.1-schnell",
        "flux1-schnell.safetensors",
        "12B, distilled to 4 steps without guidance",
        encoders="black-forest-labs/FLUX.1-schnell",
        defaults={"num_inference_steps": 4, "t5_sequence_length": 256},
        license_name="Apache-2.0",
        tiny={"dit": {"guidance_embed": False}},
    ),
    _model(
        "black-forest-labs/FLUX.1-Krea-dev",
        "flux1-krea-dev.safetensors",
        "12B, trained for less of an artificial look",
        defaults={"embedded_guidance": 4.5},
    ),
    _model(
        "black-forest-labs/FLUX.1-Kontext-dev",
        "flux1-kontext-dev.safetensors",
        "12B, changes an image, or combines several, by an instruction",
        task="image-to-image",
        defaults={"embedded_guidance": 2.5},
        tiny_inputs="kontext_inputs",
    ),
    _model(
        "black-forest-labs/FLUX.1-Fill-dev",
        "flux1-fill-dev.safetensors",
        "12B, replaces the masked part of an image",
        encoders="black-forest-labs/FLUX.1-Fill-dev",
        task="image-to-image",
        defaults={"num_inference_steps": 50, "embedded_guidance": 30.0},
        tiny={"dit": {"in_channels": 384}},
        tiny_inputs="fill_inputs",
    ),
    _model(
        "black-forest-labs/FLUX.1-Depth-dev",
        "flux1-depth-dev.safetensors",
        "12B, follows a depth map",
        task="image-to-image",
        defaults={"embedded_guidance": 10.0},
        tiny={"dit": {"in_channels": 128}},
        tiny_inputs="control_inputs",
    ),
    _model(
        "black-forest-labs/FLUX.1-Canny-dev",
        "flux1-canny-dev.safetensors",
        "12B, follows edges",
        task="image-to-image",
        defaults={"num_inference_steps": 50, "embedded_guidance": 30.0},
        tiny={"dit": {"in_channels": 128}},
        tiny_inputs="control_inputs",
    ),
    _model(
        "black-forest-labs/FLUX.1-Redux-dev",
        f"{DEV}:flux1-dev.safetensors",
        "FLUX.1-dev with networks that vary an image",
        task="image-to-image",
        defaults={"num_inference_steps": 50, "embedded_guidance": 2.5},
        tiny_inputs="redux_inputs",
        more={
            "image_encoder": "image_encoder/model.safetensors",
            "image_embedder": "image_embedder/diffusion_pytorch_model.safetensors",
        },
        tiny=TINY_REDUX,
    ),
    _model(
        "InstantX/FLUX.1-dev-IP-Adapter",
        f"{DEV}:flux1-dev.safetensors",
        "FLUX.1-dev with an adapter for image prompts",
        task="image-to-image",
        tiny_inputs="ip_adapter_inputs",
        more={
            "ipadapter": "ip-adapter.bin",
            "image_encoder": "google/siglip-so400m-patch14-384:model.safetensors",
        },
        tiny=TINY_IP_ADAPTER,
    ),
)

TRAINING = (
    TrainingSpec(
        pipeline=PIPELINE,
        trainable=("dit", "text_encoder_1", "text_encoder_2", "vae", "ipadapter"),
        lora_targets={"dit": LORA_TARGETS},
        data={
            "prompt": "prompt",
            "image": "input_image",
            "kontext_images": "kontext_images",
            "flux_fill_image": "flux_fill_image",
            "flux_fill_mask": "flux_fill_mask",
            "control_image": "control_image",
            "ipadapter_images": "ipadapter_images",
        },
        schedule="diffsynth.sampling.schedule:flux1_sigmas",
    ),
)
