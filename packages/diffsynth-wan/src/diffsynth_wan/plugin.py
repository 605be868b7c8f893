"""Plugin of diffsynth-wan: Wan's models, architectures and published files."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.hookspecs import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, DoorSpec, LoRASpec, ModelSpec
from diffsynth_wan.checkpoints import ARCHITECTURES, CHECKPOINTS
from diffsynth_wan.loras import LORAS
from diffsynth_wan.models import MODELS

DIFFSYNTH_API = 2


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
def register_loras(register: Callable[[LoRASpec], None]) -> None:
    for lora in LORAS:
        register(lora)


@hookimpl
def register_doors(register: Callable[[DoorSpec], None]) -> None:
    register(DoorSpec(name="wan_video", folder="diffsynth_wan:doors"))
