"""Plugin of diffsynth-flux: the models, architectures, published files and training of FLUX.1 and FLUX.2."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.hookspecs import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, DoorSpec, LoRASpec, ModelSpec, TrainingSpec
from diffsynth_flux.flux1 import checkpoints as flux1
from diffsynth_flux.flux1 import loras as flux1_loras
from diffsynth_flux.flux1 import models as flux1_models
from diffsynth_flux.flux2 import checkpoints as flux2
from diffsynth_flux.flux2 import models as flux2_models

DIFFSYNTH_API = 2

MODELS = (*flux1_models.MODELS, *flux2_models.MODELS)
ARCHITECTURES = (*flux1.ARCHITECTURES, *flux1.NAMED, *flux2.ARCHITECTURES)
CHECKPOINTS = (*flux1.CHECKPOINTS, *flux2.CHECKPOINTS)
TRAINING = (
    *flux1_models.TRAINING,
    *flux2_models.TRAINING,
)
DOORS = ("flux_image", "flux2_image")


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
    for training in TRAINING:
        register(training)


@hookimpl
def register_loras(register: Callable[[LoRASpec], None]) -> None:
    for lora in flux1_loras.LORAS:
        register(lora)


@hookimpl
def register_doors(register: Callable[[DoorSpec], None]) -> None:
    for name in DOORS:
        register(DoorSpec(name=name, folder="diffsynth_flux:doors"))
