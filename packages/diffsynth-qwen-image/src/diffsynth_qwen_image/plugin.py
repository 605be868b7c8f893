"""Plugin of diffsynth-qwen-image: Qwen-Image's models, architectures, published files, training and guidance."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.hookspecs import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, DoorSpec, GuidanceSpec, LoRASpec, ModelSpec, TrainingSpec
from diffsynth_qwen_image import controlnet_config, image_to_lora_config
from diffsynth_qwen_image.checkpoints import ARCHITECTURES, CHECKPOINTS, NAMED
from diffsynth_qwen_image.loras import LORAS
from diffsynth_qwen_image.models import MODELS, TRAINING

DIFFSYNTH_API = 2


@hookimpl
def register_models(register: Callable[[ModelSpec], None]) -> None:
    for model in MODELS:
        register(model)


@hookimpl
def register_architectures(register: Callable[[ArchitectureSpec], None]) -> None:
    for architecture in (*ARCHITECTURES, *NAMED, *controlnet_config.ARCHITECTURES, *image_to_lora_config.ARCHITECTURES):
        register(architecture)


@hookimpl
def register_checkpoints(register: Callable[[CheckpointSpec], None]) -> None:
    for checkpoint in (*CHECKPOINTS, *controlnet_config.CHECKPOINTS, *image_to_lora_config.CHECKPOINTS):
        register(checkpoint)


@hookimpl
def register_training(register: Callable[[TrainingSpec], None]) -> None:
    for training in TRAINING:
        register(training)


@hookimpl
def register_loras(register: Callable[[LoRASpec], None]) -> None:
    for lora in LORAS:
        register(lora)


@hookimpl
def register_guidance(register: Callable[[GuidanceSpec], None]) -> None:
    register(GuidanceSpec(name="token_norm", guidance="diffsynth_qwen_image.guidance:TokenNorm"))


@hookimpl
def register_doors(register: Callable[[DoorSpec], None]) -> None:
    register(DoorSpec(name="qwen_image", folder="diffsynth_qwen_image:doors"))
