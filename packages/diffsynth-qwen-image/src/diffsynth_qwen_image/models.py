"""The models of Qwen-Image: their files, defaults and tiny configs. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsynth.spec import ModelSpec, TrainingSpec
from diffsynth_qwen_image.checkpoints import (
    BASE,
    BASE_2512,
    DISTILL_FULL,
    EDIT,
    EDIT_2509,
    EDIT_2511,
    FIRERED_1_0,
    FIRERED_1_1,
    LAYERED,
    LAYERED_CONTROL,
    LORA_TARGETS,
)

PIPELINE = "diffsynth_qwen_image.pipeline:QwenImagePipeline"

TINY = {
    "dit": {"dim": 256, "n_heads": 2, "prompt_dim": 64, "ffn_dim": 256, "axes_dims": (16, 56, 56)},
    "text_encoder": {"hidden_size": 64, "vocab_size": 320},
}
"""Config fields of the tiny networks; the transformer's head dimension and RoPE axes are the published ones."""

TINY_LAYERED = TINY | {"dit": TINY["dit"] | {"layered": True}, "vae": {"in_channels": 4}}
"""Those of the models that compute layers."""

_TINY = "diffsynth_qwen_image.tiny"


def _model(
    hub_id: str,
    description: str,
    *,
    file: str = "transformer/diffusion_pytorch_model*.safetensors",
    defaults: Mapping[str, Any] | None = None,
    inputs: str = "",
    layered: bool = False,
) -> ModelSpec:
    """Return the `ModelSpec` of a model with the text encoder of Qwen-Image.

    Args:
        hub_id, description, defaults: fields of `ModelSpec`.
        file: the transformer, in the model's repository.
        inputs: for a model that needs images, the name of the function in `diffsynth_qwen_image.tiny` that makes them.
        layered: whether it computes layers, with an autoencoder for RGBA; others that need images edit them.
    """
    processors = {"tokenizer": f"{BASE}:tokenizer/"}
    if inputs and not layered:
        processors["processor"] = f"{EDIT}:processor/"
    writers = {"tokenizer": f"{_TINY}:write_tokenizer", "processor": f"{_TINY}:write_image_processor"}
    return ModelSpec(
        name=hub_id.rpartition("/")[2].lower(),
        hub_id=hub_id,
        family="qwen-image",
        task="image-to-image" if inputs else "text-to-image",
        pipeline=PIPELINE,
        components={
            "dit": f"{hub_id}:{file}",
            "text_encoder": f"{BASE}:text_encoder/model*.safetensors",
            "vae": f"{LAYERED if layered else BASE}:vae/diffusion_pytorch_model.safetensors",
        },
        processors=processors,
        tiny=TINY_LAYERED if layered else TINY,
        tiny_processors={role: writers[role] for role in processors},
        tiny_inputs=f"{_TINY}:{inputs}" if inputs else "",
        defaults={"num_inference_steps": 40} | dict(defaults or {}),
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
    _model(EDIT, "20B; edits an image", inputs="edit_inputs"),
    _model(EDIT_2509, "20B; edits one image or several", inputs="edit_list_inputs"),
    _model(
        EDIT_2511,
        "20B; edits one image or several; weights of November 2025",
        defaults={"zero_cond_t": True},
        inputs="edit_list_inputs",
    ),
    _model(FIRERED_1_0, "20B; edits an image", inputs="edit_inputs"),
    _model(FIRERED_1_1, "20B; edits an image", inputs="edit_inputs"),
    _model(
        LAYERED,
        "20B; takes an image apart into RGBA layers",
        defaults={"num_inference_steps": 50, "layer_num": 4, "layered_schedule": True, "height": 640, "width": 640},
        inputs="layer_inputs",
        layered=True,
    ),
    _model(
        LAYERED_CONTROL,
        "20B; takes one RGBA layer out of an image, by a prompt",
        defaults={"num_inference_steps": 30, "layer_num": 0, "height": 1024, "width": 1024},
        inputs="layer_input",
        layered=True,
    ),
)

TRAINING = (
    TrainingSpec(
        pipeline=PIPELINE,
        trainable=("dit", "text_encoder", "vae"),
        lora_targets={"dit": LORA_TARGETS},
        data={"prompt": "prompt", "image": "input_image", "edit_image": "edit_image"},
        schedule="diffsynth.sampling.schedule:qwen_image_sigmas",
    ),
)
