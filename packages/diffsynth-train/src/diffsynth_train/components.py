"""From a recipe to a pipeline: modules read from files or drawn at random, and what of them learns."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth import _discovery, registry
from diffsynth.core.loader import component, header, recognize
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.identity import file_identity
from diffsynth.errors import TrainingError, did_you_mean
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.role import Role
from diffsynth.spec import ArchitectureSpec, TrainingSpec, resolve
from diffsynth_train.config import ComponentRecipe, Recipe

logger = logging.getLogger(__name__)


@dataclass
class Component:
    """A module under a role, and what a file of it must say.

    `identity` tells its weights from others, for caches; it is empty for a module that learns. `base` is the signature
    of the checkpoint that its weights began as.
    """

    role: str
    architecture: ArchitectureSpec
    module: nn.Module
    trained: bool
    identity: str
    base: str = ""

    @property
    def config(self) -> Any:
        """The dataclass it was built from."""
        return self.module.config

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, with the role before them, and parameters that learn."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield f"{self.role}.{name}", parameter


def training_spec(recipe: Recipe) -> TrainingSpec:
    """How the recipe's pipeline is trained.

    Raises:
        TrainingError: no plugin says how.
        UnknownModel: `pipeline` is no reference, and no model of that name is installed.
    """
    reference = recipe.pipeline if ":" in recipe.pipeline else registry.get(recipe.pipeline).pipeline
    for declared in _discovery.catalog().training:
        if declared.spec.pipeline == reference:
            return declared.spec
    known = [declared.spec.pipeline for declared in _discovery.catalog().training]
    raise TrainingError(f"no plugin says how to train {reference!r}{did_you_mean(reference, known)}")


def build_components(recipe: Recipe, spec: TrainingSpec) -> dict[str, Component]:
    """Modules by role, fp32 on the CPU; those that do not learn are frozen and in eval mode.

    Raises:
        TrainingError: an unknown role, architecture or config field, a role that cannot be trained, nothing to train.
        CheckpointError: a source is missing or unfit.
    """
    roles = {name: role for name, role in resolve(spec.pipeline).roles.items() if isinstance(role, Role)}
    components = {}
    for name, part in recipe.components.items():
        if name not in roles:
            raise TrainingError(f"[components.{name}]: {spec.pipeline} has no such role{did_you_mean(name, roles)}")
        if part.train and name not in spec.trainable:
            raise TrainingError(f"[components.{name}]: cannot be trained; {', '.join(spec.trainable)} can")
        component = _from_file(name, part) if part.source else _from_scratch(name, part)
        if component.architecture.name not in roles[name].architectures:
            raise TrainingError(
                f"[components.{name}]: a {component.architecture.name}; "
                f"this role takes {' or '.join(roles[name].architectures)}"
            )
        _freeze(component, part)
        components[name] = component
    if not any(True for component in components.values() for _ in component.trainable()):
        raise TrainingError("nothing learns: set train = true in a [components.*] section")
    return components


def build_pipeline(
    recipe: Recipe, spec: TrainingSpec, components: Mapping[str, Component], device: torch.device
) -> Pipeline:
    """The pipeline that holds the components and processors, in fp32: autocast lowers what it may."""
    cls: type[Pipeline] = resolve(spec.pipeline)
    parts: dict[str, Any] = {role: component.module for role, component in components.items()}
    for role, folder in recipe.processors.items():
        if role not in cls.roles or isinstance(cls.roles[role], Role):
            raise TrainingError(
                f"[processors]: {spec.pipeline} has no processor {role!r}{did_you_mean(role, cls.roles)}"
            )
        if not Path(folder).is_dir():
            raise TrainingError(f"[processors]: {role} = {folder!r} is no folder")
        parts[role] = resolve(cls.roles[role].loader).from_pretrained(folder, local_files_only=True)
    return cls.from_components(device=device, torch_dtype=torch.float32, **parts)


def repeated_blocks(component: Component) -> Iterator[nn.Module]:
    """The blocks that its architecture names as repeated."""
    for name in component.architecture.repeated_blocks:
        yield from component.module.get_submodule(name)


def _from_file(role: str, part: ComponentRecipe) -> Component:
    source = ModelConfig.from_source(part.source) if "://" in part.source else ModelConfig(path=part.source)
    tensors = header.read_config(source, resolve=lambda text: _discovery.first("resolve_source", source=text))
    found = recognize.recognize(tensors, *_discovery.catalog().layouts())
    if len(found) != 1:
        raise TrainingError(f"[components.{role}]: {part.source} holds {len(found)} components; expected one")
    # Training writes to the weights, and later to files: it wants none of them mapped.
    module = component.load_component(found[0], tensors, device="cpu", dtype=torch.float32, copy=True)
    identity = ",".join(file_identity(file) for file in tensors.files)
    base = header.signature(tensors.shapes)
    return Component(role, found[0].architecture, module, part.train, "" if part.train else identity, base)


def _from_scratch(role: str, part: ComponentRecipe) -> Component:
    declared, _ = _discovery.catalog().layouts()
    if part.architecture not in declared:
        near = did_you_mean(part.architecture, declared)
        raise TrainingError(f"[components.{role}]: architecture {part.architecture!r} is not installed{near}")
    architecture = declared[part.architecture]
    config_class = resolve(architecture.config)
    fields = [each.name for each in dataclasses.fields(config_class)]
    for key in part.config:
        if key not in fields:
            raise TrainingError(f"[components.{role}.config]: unknown key {key!r}{did_you_mean(key, fields)}")
    module = resolve(architecture.module)(config_class(**part.config))
    if part.init:
        resolve(part.init)(module)
    return Component(role, architecture, module, part.train, "")


def _freeze(component: Component, part: ComponentRecipe) -> None:
    component.module.requires_grad_(part.train)
    component.module.train(part.train)
    for pattern in part.freeze:
        names = [name for name, _ in component.module.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise TrainingError(f"[components.{component.role}]: freeze pattern {pattern!r} matches no parameter")
        for name in names:
            component.module.get_parameter(name).requires_grad_(False)
    learning = sum(parameter.numel() for _, parameter in component.trainable())
    total = sum(parameter.numel() for parameter in component.module.parameters())
    logger.info(
        "%s: %s, %.2fM parameters, %.2fM learn",
        component.role,
        component.architecture.name,
        total / 1e6,
        learning / 1e6,
    )
