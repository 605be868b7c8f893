"""`ModelSpec`s of the published Wan models. Light: no torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffsynth.spec import ModelSpec, TeaCacheSpec
from diffsynth_wan.checkpoints import CONVERTED, IMAGE_ENCODER_FILE, TEXT_ENCODER_FILE

PIPELINE = "diffsynth_wan.pipeline:WanVideoPipeline"
TOKENIZER = "Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/"
TEXT_ENCODER = f"{CONVERTED}:{TEXT_ENCODER_FILE}.safetensors"
IMAGE_ENCODER = f"{CONVERTED}:{IMAGE_ENCODER_FILE}.safetensors"
VAE = f"{CONVERTED}:Wan2.1_VAE.safetensors"
VAE_22 = f"{CONVERTED}:Wan2.2_VAE.safetensors"
NETWORK = "diffusion_pytorch_model*.safetensors"
FPS = 16.0
T2V, I2V, V2V = "text-to-video", "image-to-video", "video-to-video"

TEXT_DIM, IMAGE_DIM, IMAGE_TOKENS = 64, 160, 17
"""Widths and number of image tokens of the tiny encoders."""

TINY_ENCODERS = {"text_encoder": {"dim": TEXT_DIM, "vocab_size": 320}, "image_encoder": {"dim": IMAGE_DIM}}
TINY_ADAPTERS = {"animate_adapter": {"motion_channels": (4,) * 8}}
"""The motion encoder keeps its depth, because the rules of published files number its layers."""

INPAINT, CAMERA, CONTROL, CONTROL_AND_MASK = 36, 32, 48, 52
"""`in_channels`: 16 for latents, plus mask and image; image; control video and image; control video, mask and image."""


def _fitted(*coefficients: float) -> TeaCacheSpec:
    # Published twice: these are fitted to the six modulations of a block, the others to the time embedding.
    return TeaCacheSpec(coefficients=coefficients, signal="argument:modulation")


TEA_CACHE = {
    "wan2.1-t2v-1.3b": _fitted(-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "wan2.1-t2v-14b": _fitted(-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    "wan2.1-i2v-14b-480p": _fitted(2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "wan2.1-i2v-14b-720p": _fitted(8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}
"""Model name -> published coefficients of TeaCache (Liu et al. 2024, arXiv:2411.19108); there are none for Wan 2.2."""


def _model(
    hub_id: str,
    task: str,
    description: str,
    *,
    files: Mapping[str, str] | None = None,
    image_encoder: bool = False,
    tiny: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    vae: str = VAE,
    paper: str = "arXiv:2503.20314",
    tiny_inputs: str = "",
) -> ModelSpec:
    """Return the `ModelSpec` of a Wan model: its networks in `files`, the text encoder and tokenizer that Wan models
    share, the autoencoder `vae` and, if `image_encoder`, CLIP.

    Args:
        hub_id, task, description, defaults, paper: fields of `ModelSpec`.
        files: role -> file in the model's repository, or `REPOSITORY:FILE`; by default `dit` alone.
        image_encoder: whether the model has an image encoder.
        tiny: config fields of the tiny transformers.
        vae: source of the autoencoder.
        tiny_inputs: name of the function in `diffsynth_wan.tiny` that makes the inputs that the model needs.
    """
    sources = {role: file if ":" in file else f"{hub_id}:{file}" for role, file in (files or {"dit": NETWORK}).items()}
    encoders = {"text_encoder": TEXT_ENCODER} | ({"image_encoder": IMAGE_ENCODER} if image_encoder else {})
    network = dict(tiny or {}) | ({"image_dim": IMAGE_DIM} if image_encoder else {})
    name = hub_id.rpartition("/")[2].lower()
    return ModelSpec(
        name=name,
        hub_id=hub_id,
        family="wan",
        task=task,
        pipeline=PIPELINE,
        components={**sources, **encoders, "vae": vae},
        processors={"tokenizer": TOKENIZER},
        tiny={role: network for role in sources if role in ("dit", "dit2")}
        | {role: TINY_ENCODERS[role] for role in encoders}
        | {role: TINY_ADAPTERS[role] for role in sources if role in TINY_ADAPTERS},
        tiny_processors={"tokenizer": "diffsynth_wan.tiny:write_tiny_tokenizer"},
        tiny_inputs=f"diffsynth_wan.tiny:{tiny_inputs}" if tiny_inputs else "",
        defaults=defaults or {},
        license="Apache-2.0",
        paper=paper,
        description=description,
        tea_cache=TEA_CACHE.get(name),
        fps=FPS,
    )


def _experts(*roles: str) -> dict[str, str]:
    """Return a dict role (name of a component) -> file for two experts: `"dit"` -> the high-noise file, `"dit2"` -> the
    low-noise file, and so on for each of `roles`.
    """
    high, low = f"high_noise_model/{NETWORK}", f"low_noise_model/{NETWORK}"
    return dict.fromkeys(roles, high) | {f"{role}2": low for role in roles}


VACE = {"dit": NETWORK, "vace": NETWORK}

ANIMATE_2 = replace(
    _model(
        "Wan-AI/Wan2.2-Animate-2-14B",
        V2V,
        "14B, animates a character by a reference video, clip by clip",
        files={"dit": "wan_animate_2/wan_animate_2_bf16.safetensors"},
        image_encoder=True,
        tiny={"in_channels": INPAINT},
        defaults={
            "height": 1280,
            "width": 720,
            "num_inference_steps": 40,
            "cfg_scale": 3.0,
            "animate2_offload_kv": True,
            "resize_mode": "pad",
        },
        paper="",
        tiny_inputs="animate2_inputs",
    ),
    processors={"tokenizer": "Wan-AI/Wan2.2-Animate-2-14B:videomodel/Wan-AI/umt5-xxl/"},
    fps=24.0,
)
ANIMATE_2_DISTILLED = replace(
    ANIMATE_2,
    name="wan2.2-animate-2-14b-distilled",
    hub_id=None,  # the repository's id already names the other model in it
    components={
        **ANIMATE_2.components,
        "dit": "Wan-AI/Wan2.2-Animate-2-14B:wan_animate_2/wan_animate_2_bf16_distillation.safetensors",
    },
    defaults={**ANIMATE_2.defaults, "num_inference_steps": 10, "cfg_scale": 1.0, "animate2_log_scale": -1.3},
    description="Wan2.2-Animate-2-14B, distilled to 10 steps without guidance",
)

MODELS = (
    _model("Wan-AI/Wan2.1-T2V-1.3B", T2V, "1.3B, text or video to video at 480p"),
    _model("Wan-AI/Wan2.1-T2V-14B", T2V, "14B, text or video to video at 480p and 720p"),
    _model(
        "Wan-AI/Wan2.1-I2V-14B-480P",
        I2V,
        "14B, image to video at 480p",
        image_encoder=True,
        tiny={"in_channels": INPAINT},
        tiny_inputs="image_inputs",
    ),
    _model(
        "Wan-AI/Wan2.1-I2V-14B-720P",
        I2V,
        "14B, image to video at 720p",
        image_encoder=True,
        tiny={"in_channels": INPAINT},
        tiny_inputs="image_inputs",
        defaults={"height": 720, "width": 1280},
    ),
    _model(
        "Wan-AI/Wan2.1-FLF2V-14B-720P",
        I2V,
        "14B, video between a first and a last image",
        image_encoder=True,
        tiny={"in_channels": INPAINT, "image_tokens": 2 * IMAGE_TOKENS},
        defaults={"height": 720, "width": 1280, "sigma_shift": 16.0},
        tiny_inputs="first_and_last_inputs",
    ),
    _model(
        "iic/VACE-Wan2.1-1.3B-Preview",
        V2V,
        "1.3B: control videos, edits and reference images",
        files=VACE,
        tiny_inputs="vace_inputs",
    ),
    _model(
        "Wan-AI/Wan2.1-VACE-1.3B",
        V2V,
        "1.3B: control videos, edits and reference images",
        files=VACE,
        tiny_inputs="vace_inputs",
    ),
    _model(
        "Wan-AI/Wan2.1-VACE-14B",
        V2V,
        "14B: control videos, edits and reference images",
        files=VACE,
        tiny_inputs="vace_inputs",
    ),
    *(
        _model(
            f"PAI/Wan2.1-Fun-{version}{size}-InP",
            I2V,
            f"{size}, video from a first and a last image",
            image_encoder=True,
            tiny={"in_channels": INPAINT},
            tiny_inputs="first_and_last_inputs",
        )
        for version in ("", "V1.1-")
        for size in ("1.3B", "14B")
    ),
    *(
        _model(
            f"PAI/Wan2.1-Fun-{size}-Control",
            V2V,
            f"{size}, controlled by poses, depth or edges",
            image_encoder=True,
            tiny={"in_channels": CONTROL},
            tiny_inputs="control_inputs",
        )
        for size in ("1.3B", "14B")
    ),
    *(
        _model(
            f"PAI/Wan2.1-Fun-V1.1-{size}-Control",
            V2V,
            f"{size}, controlled by poses, depth or edges and a reference image",
            image_encoder=True,
            tiny={"in_channels": CONTROL, "reference_channels": 16},
            tiny_inputs="control_and_reference_inputs",
        )
        for size in ("1.3B", "14B")
    ),
    *(
        _model(
            f"PAI/Wan2.1-Fun-V1.1-{size}-Control-Camera",
            I2V,
            f"{size}, image to video with a camera path",
            image_encoder=True,
            tiny={"in_channels": CAMERA, "camera_channels": 24},
            tiny_inputs="camera_inputs",
        )
        for size in ("1.3B", "14B")
    ),
    _model(
        "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1",
        T2V,
        "Wan2.1-T2V-1.3B with a control of the amount of motion",
        files={"dit": f"Wan-AI/Wan2.1-T2V-1.3B:{NETWORK}", "motion_controller": "model.safetensors"},
        tiny_inputs="speed_inputs",
    ),
    _model(
        "krea/krea-realtime-video",
        T2V,
        "14B, distilled to 6 steps without guidance",
        files={"dit": "krea-realtime-video-14b.safetensors"},
        defaults={"num_inference_steps": 6, "cfg_scale": 1.0, "sigma_shift": 20.0},
        paper="",
    ),
    _model("Wan-AI/Wan2.2-T2V-A14B", T2V, "two experts of 14B, text or video to video", files=_experts("dit")),
    _model(
        "Wan-AI/Wan2.2-I2V-A14B",
        I2V,
        "two experts of 14B, image to video",
        files=_experts("dit"),
        tiny={"in_channels": INPAINT},
        defaults={"switch_DiT_boundary": 0.9},
        tiny_inputs="image_inputs",
    ),
    replace(
        _model(
            "Wan-AI/Wan2.2-TI2V-5B",
            I2V,
            "5B, with or without a first image, 720p at 24 frames per second",
            tiny={"in_channels": 48, "out_channels": 48, "frame_times": True},
            defaults={"height": 704, "width": 1280, "num_frames": 121},
            vae=VAE_22,
            tiny_inputs="image_inputs",
        ),
        fps=24.0,
    ),
    _model(
        "Wan-AI/Wan2.2-Animate-14B",
        V2V,
        "14B, animates a character by a video, or replaces the person in it",
        files={"dit": NETWORK, "animate_adapter": NETWORK},
        image_encoder=True,
        tiny={"in_channels": INPAINT},
        defaults={"height": 720, "width": 1280, "num_inference_steps": 20, "cfg_scale": 1.0},
        paper="arXiv:2509.14055",
        tiny_inputs="animate_inputs",
    ),
    ANIMATE_2,
    ANIMATE_2_DISTILLED,
    _model(
        "PAI/Wan2.2-VACE-Fun-A14B",
        V2V,
        "two experts of 14B: control videos, edits and reference images",
        files=_experts("dit", "vace"),
        tiny_inputs="vace_inputs",
    ),
    _model(
        "PAI/Wan2.2-Fun-A14B-InP",
        I2V,
        "two experts of 14B, video from a first and a last image",
        files=_experts("dit"),
        tiny={"in_channels": INPAINT},
        tiny_inputs="first_and_last_inputs",
    ),
    _model(
        "PAI/Wan2.2-Fun-A14B-Control",
        V2V,
        "two experts of 14B, controlled by poses, depth or edges and a reference image",
        files=_experts("dit"),
        tiny={"in_channels": CONTROL_AND_MASK, "reference_channels": 16},
        tiny_inputs="control_and_reference_inputs",
    ),
    _model(
        "PAI/Wan2.2-Fun-A14B-Control-Camera",
        I2V,
        "two experts of 14B, image to video with a camera path",
        files=_experts("dit"),
        tiny={"in_channels": INPAINT, "camera_channels": 24},
        tiny_inputs="camera_inputs",
    ),
)
