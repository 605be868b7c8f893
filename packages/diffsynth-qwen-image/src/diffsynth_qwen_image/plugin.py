"""Plugin of diffsynth-qwen-image: Qwen-Image's architectures and published files."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.hookspecs import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec
from diffsynth_qwen_image.checkpoints import ARCHITECTURES, CHECKPOINTS

DIFFSYNTH_API = 2


@hookimpl
def register_architectures(register: Callable[[ArchitectureSpec], None]) -> None:
    for architecture in ARCHITECTURES:
        register(architecture)


@hookimpl
def register_checkpoints(register: Callable[[CheckpointSpec], None]) -> None:
    for checkpoint in CHECKPOINTS:
        register(checkpoint)
