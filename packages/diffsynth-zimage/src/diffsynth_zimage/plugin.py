"""Plugin of diffsynth-zimage: Z-Image's models, architectures, published files and training."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.hookspecs import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, DoorSpec, LoRASpec, ModelSpec, TrainingSpec
from diffsynth_zimage.checkpoints import ARCHITECTURES, CHECKPOINTS, LORA_TARGETS, OMNI_BASE

DIFFSYNTH_API = 2

PIPELINE = "diffsynth_zimage.pipeline:ZImagePipeline"
TEXT_ENCODER = "Tongyi-MAI/Z-Image-Turbo:text_encoder/*.safetensors"
VAE = "Tongyi-MAI/Z-Image-Turbo:vae/diffusion_pytorch_model.safetensors"
TOKENIZER = "Tongyi-MAI/Z-Image-Turbo:tokenizer/"
NANO = "package://diffsynth_zimage/nano"
TINY = {
    "dit": {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "axes_dims": (32, 48, 48), "cap_feat_dim": 64},
    "text_encoder": {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "vocab_size": 320},
}
"""Config fields of the tiny networks; head dimension and RoPE axes are those of the published ones."""

TINY_OMNI = {
    **TINY,
    "dit": {**TINY["dit"], "siglip_feat_dim": 144},
    "image_encoder": {"hidden_size": 144, "num_layers": 2, "intermediate_size": 80},
}

MODELS = (
    ModelSpec(
        name="z-image-turbo",
        hub_id="Tongyi-MAI/Z-Image-Turbo",
        family="z-image",
        task="text-to-image",
        pipeline=PIPELINE,
        components={
            "dit": "Tongyi-MAI/Z-Image-Turbo:transformer/*.safetensors",
            "text_encoder": TEXT_ENCODER,
            "vae": VAE,
        },
        processors={"tokenizer": TOKENIZER},
        tiny=TINY,
        license="Apache-2.0",
        paper="arXiv:2511.22699",
        description="6B, distilled to 8 steps without guidance",
    ),
    ModelSpec(
        name="z-image",
        hub_id="Tongyi-MAI/Z-Image",
        family="z-image",
        task="text-to-image",
        pipeline=PIPELINE,
        components={
            "dit": "Tongyi-MAI/Z-Image:transformer/*.safetensors",
            "text_encoder": TEXT_ENCODER,
            "vae": VAE,
        },
        processors={"tokenizer": TOKENIZER},
        tiny=TINY,
        defaults={"num_inference_steps": 50, "cfg_scale": 4.0},
        license="Apache-2.0",
        paper="arXiv:2511.22699",
        description="6B, the undistilled base model",
    ),
    ModelSpec(
        name="z-image-omni-base",
        hub_id=OMNI_BASE,
        family="z-image",
        task="image-to-image",
        pipeline=PIPELINE,
        components={
            "dit": f"{OMNI_BASE}:transformer/*.safetensors",
            "text_encoder": TEXT_ENCODER,
            "vae": VAE,
            "image_encoder": f"{OMNI_BASE}:siglip/model.safetensors",
        },
        processors={"tokenizer": TOKENIZER},
        tiny=TINY_OMNI,
        tiny_inputs="diffsynth_zimage.tiny:edit_inputs",
        defaults={"num_inference_steps": 40, "cfg_scale": 4.0},
        license="Apache-2.0",
        paper="arXiv:2511.22699",
        description="6B, generates images and edits reference images",
    ),
    ModelSpec(
        name="z-image-nano",
        family="z-image",
        task="text-to-image",
        pipeline=PIPELINE,
        components={
            "dit": f"{NANO}/dit.safetensors",
            "text_encoder": f"{NANO}/text_encoder.safetensors",
            "vae": f"{NANO}/vae.safetensors",
        },
        processors={"tokenizer": f"{NANO}/tokenizer/"},
        defaults={"height": 128, "width": 128, "num_inference_steps": 12, "cfg_scale": 3.0},
        license="OFL-1.1",
        description="ships inside the wheel; generates the emoji it was trained on, in seconds on a CPU",
    ),
)


@hookimpl
def register_models(register: Callable[[ModelSpec], None]) -> None:
    for model in MODELS:
        register(model)


@hookimpl
def register_architectures(register: Callable[[ArchitectureSpec], None]) -> None:
    for architecture in ARCHITECTURES:
        register(architecture)


@hookimpl
def register_checkpoints(register: Callable[[CheckpointSpec], None]) -> None:
    for checkpoint in CHECKPOINTS:
        register(checkpoint)


@hookimpl
def register_training(register: Callable[[TrainingSpec], None]) -> None:
    register(
        TrainingSpec(
            pipeline=PIPELINE,
            trainable=("dit", "text_encoder", "vae"),
            lora_targets={"dit": LORA_TARGETS},
            data={"prompt": "prompt", "image": "input_image"},
            schedule="diffsynth.sampling.schedule:z_image_sigmas",
        )
    )


@hookimpl
def register_loras(register: Callable[[LoRASpec], None]) -> None:
    register(
        LoRASpec(
            name="z-image-turbo-distill-patch",
            pipeline=PIPELINE,
            defaults={"num_inference_steps": 8, "cfg_scale": 1.0},
            files=("DiffSynth-Studio/Z-Image-Turbo-DistillPatch:*.safetensors",),
        )
    )


@hookimpl
def register_doors(register: Callable[[DoorSpec], None]) -> None:
    register(DoorSpec(name="z_image", folder="diffsynth_zimage:doors"))
