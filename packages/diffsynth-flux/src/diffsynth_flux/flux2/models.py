"""The models of FLUX.2: their files, defaults and tiny configs."""

from __future__ import annotations

from diffsynth.spec import ModelSpec, TrainingSpec
from diffsynth_flux.flux2.checkpoints import (
    DEV,
    KLEIN_4B,
    KLEIN_9B,
    KLEIN_9B_KV,
    KLEIN_BASE_4B,
    KLEIN_BASE_9B,
    LORA_TARGETS,
)

PIPELINE = "diffsynth_flux.flux2.pipeline:Flux2ImagePipeline"

_TINY_DIT = {
    "dim": 128,
    "n_heads": 1,
    "n_layers": 1,
    "n_single_layers": 2,
    "prompt_dim": 192,
    "ffn_dim": 192,
    "axes_dims": (32, 32, 32, 32),
}
_TINY_TEXT = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 320, "num_layers": 4}
TINY = {
    "dit": _TINY_DIT | {"embeds_guidance": False},
    "text_encoder": _TINY_TEXT | {"head_dim": 128},
}
"""Config fields of the tiny networks; head dimension and RoPE axes are those of the published ones."""

TINY_DEV = {"dit": _TINY_DIT, "text_encoder": _TINY_TEXT}
"""Those of FLUX.2-dev, which takes guidance and has Mistral as its text encoder."""


def _klein(name: str, hub_id: str, shared: str, size: str, *, base: bool, license: str) -> ModelSpec:
    """Return the `ModelSpec` of a FLUX.2-klein; `shared` is the repository of its text encoder and autoencoder."""
    defaults = {"num_inference_steps": 50, "cfg_scale": 4.0} if base else {"num_inference_steps": 4}
    return ModelSpec(
        name=name,
        hub_id=hub_id,
        family="flux-2",
        task="text-to-image",
        pipeline=PIPELINE,
        components={
            "dit": f"{hub_id}:transformer/*.safetensors",
            "text_encoder": f"{shared}:text_encoder/*.safetensors",
            "vae": f"{shared}:vae/diffusion_pytorch_model.safetensors",
        },
        processors={"tokenizer": f"{shared}:tokenizer/"},
        tiny=TINY,
        defaults=defaults | ({"edit_image_kv_cache": True} if name.endswith("-kv") else {}),
        license=license,
        description=f"{size}, {'the undistilled base model' if base else 'distilled to 4 steps without guidance'}",
    )


_NON_COMMERCIAL = "FLUX Non-Commercial License"

MODELS = (
    ModelSpec(
        name="flux.2-dev",
        hub_id=DEV,
        family="flux-2",
        task="text-to-image",
        pipeline=PIPELINE,
        components={
            "dit": f"{DEV}:transformer/*.safetensors",
            "text_encoder": f"{DEV}:text_encoder/*.safetensors",
            "vae": f"{DEV}:vae/diffusion_pytorch_model.safetensors",
        },
        processors={"tokenizer": f"{DEV}:tokenizer/"},
        tiny=TINY_DEV,
        defaults={"num_inference_steps": 50},
        license=_NON_COMMERCIAL,
        description="32B, guidance distilled; edits up to 10 reference images",
    ),
    _klein("flux.2-klein-4b", KLEIN_4B, KLEIN_4B, "4B", base=False, license="Apache-2.0"),
    _klein("flux.2-klein-9b", KLEIN_9B, KLEIN_9B, "9B", base=False, license=_NON_COMMERCIAL),
    _klein("flux.2-klein-9b-kv", KLEIN_9B_KV, KLEIN_9B, "9B", base=False, license=_NON_COMMERCIAL),
    _klein("flux.2-klein-base-4b", KLEIN_BASE_4B, KLEIN_4B, "4B", base=True, license="Apache-2.0"),
    _klein("flux.2-klein-base-9b", KLEIN_BASE_9B, KLEIN_9B, "9B", base=True, license=_NON_COMMERCIAL),
)

TRAINING = (
    TrainingSpec(
        pipeline=PIPELINE,
        trainable=("dit", "text_encoder", "vae"),
        lora_targets={"dit": LORA_TARGETS},
        data={"prompt": "prompt", "image": "input_image", "edit_image": "edit_image"},
        schedule="diffsynth.sampling.schedule:flux2_sigmas",
    ),
)
