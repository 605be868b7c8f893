"""Declarations of diffsynth-train: its objectives and the `train` command."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.hookspecs import hookimpl
from diffsynth.spec import CommandSpec, ObjectiveSpec

DIFFSYNTH_API = 2


@hookimpl
def register_objectives(register: Callable[[ObjectiveSpec], None]) -> None:
    register(ObjectiveSpec(name="flow_match", objective="diffsynth_train.objectives.flow_match:FlowMatch"))
    register(ObjectiveSpec(name="reconstruction", objective="diffsynth_train.objectives.reconstruction:Reconstruction"))


@hookimpl
def register_commands(register: Callable[[CommandSpec], None]) -> None:
    register(CommandSpec(name="train", command="diffsynth_train.cli:train", help="Train according to a recipe."))
