"""Construction of the pipeline of a recipe: components from files or from configs, trained or frozen."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth import _discovery, registry
from diffsynth.core.loader import component, files, header, recognize
from diffsynth.core.loader.checkpoint import read_config
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.identity import file_identity
from diffsynth.errors import TrainingError, did_you_mean
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.role import Role, load_processor
from diffsynth.spec import ArchitectureSpec, TrainingSpec, resolve
from diffsynth.terminal import module_logger
from diffsynth_train.config import ComponentRecipe, Recipe

logger = module_logger(__name__)


@dataclass
class Component:
    """A component of the pipeline, and the facts that are stored with its weights.

    Args:
        role: name in the pipeline.
        architecture: declaration of its architecture.
        module: the module, fp32.
        trained: whether it is trained.
        identity: identity of the files of its weights, for cache keys; empty for a trained component.
        base: signature of the checkpoint that training started from; empty if it started from scratch.
    """

    role: str
    architecture: ArchitectureSpec
    module: nn.Module
    trained: bool
    identity: str
    base: str = ""

    @property
    def config(self) -> Any:
        """Config of the component's module, an instance of its architecture's config dataclass."""
        return self.module.config

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield a pair (`"role.name"`, parameter) for each parameter of the component that requires a gradient."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield f"{self.role}.{name}", parameter


def training_spec(recipe: Recipe) -> TrainingSpec:
    """Return the `TrainingSpec` that a plugin declares for the pipeline of `recipe`.

    Raises:
        TrainingError: no plugin declares training for the pipeline.
        UnknownModel: `pipeline` is neither a reference nor the name of an installed model.
    """
    reference = recipe.pipeline if ":" in recipe.pipeline else registry.get(recipe.pipeline).pipeline
    for declared in _discovery.catalog().training:
        if declared.spec.pipeline == reference:
            return declared.spec
    known = [declared.spec.pipeline for declared in _discovery.catalog().training]
    raise TrainingError(f"no plugin declares training for {reference!r}{did_you_mean(reference, known)}")


def build_components(recipe: Recipe, spec: TrainingSpec) -> dict[str, Component]:
    """Return a dict role (name of a component) -> `Component`, for each in the recipe, with an fp32 module on the CPU;
    parameters that are not trained are frozen.

    Raises:
        TrainingError: unknown role, architecture or config field, a role that cannot be trained, or no trained one.
        CheckpointError: a source is missing or cannot be loaded.
    """
    roles = {name: role for name, role in resolve(spec.pipeline).roles.items() if isinstance(role, Role)}
    components = {}
    for name, section in recipe.components.items():
        if name not in roles:
            raise TrainingError(f"[components.{name}]: {spec.pipeline} has no such role{did_you_mean(name, roles)}")
        if section.train and name not in spec.trainable:
            raise TrainingError(f"[components.{name}]: cannot be trained; {', '.join(spec.trainable)} can")
        component = _from_file(name, section) if section.source else _from_scratch(name, section)
        if not roles[name].accepts(component.architecture):
            raise TrainingError(
                f"[components.{name}]: a {component.architecture.name}; "
                f"this role takes {' or '.join(roles[name].architectures)}"
            )
        _freeze(component, section)
        components[name] = component
    if not any(True for component in components.values() for _ in component.trainable()):
        raise TrainingError("no component is trained: set train = true in a [components.*] section")
    return components


def build_pipeline(
    recipe: Recipe, spec: TrainingSpec, components: Mapping[str, Component], device: torch.device
) -> Pipeline:
    """Return the recipe's `Pipeline` on `device`, with the given components in fp32 and the processors (such as
    tokenizers) loaded from the recipe's folders.

    Raises:
        TrainingError: a processor that the pipeline does not have, or no folder of that path.
        InvalidPipeline: components that do not fit each other, such as a text encoder of another width.
    """
    cls: type[Pipeline] = resolve(spec.pipeline)
    members: dict[str, Any] = {role: component.module for role, component in components.items()}
    for role, folder in recipe.processors.items():
        if role not in cls.roles or isinstance(cls.roles[role], Role):
            raise TrainingError(
                f"[processors]: {spec.pipeline} has no processor {role!r}{did_you_mean(role, cls.roles)}"
            )
        members[role] = load_processor(role, cls.roles[role], _processor_folder(role, folder))
    return cls.from_components(device=device, torch_dtype=torch.float32, **members)


def _processor_folder(role: str, source: str) -> Path:
    """Return the folder of a processor: a path, or where the files of a source such as "package://name/folder/" are."""
    if "://" in source:
        return files.find(ModelConfig.from_source(source), resolve=_resolve_source)[0]
    if not Path(source).is_dir():
        raise TrainingError(f"[processors]: {role} = {source!r} is not a folder")
    return Path(source)


def _resolve_source(source: str) -> list[Path] | None:
    return _discovery.first("resolve_source", source=source)


def _from_file(role: str, section: ComponentRecipe) -> Component:
    source = ModelConfig.from_source(section.source) if "://" in section.source else ModelConfig(path=section.source)
    tensors = read_config(source, resolve=_resolve_source)
    found = recognize.recognize(tensors, *_discovery.catalog().layouts())
    if len(found) != 1:
        raise TrainingError(f"[components.{role}]: {section.source} holds {len(found)} components; expected one")
    # copy=True: training writes to the weights in place, so they must not be memory-mapped files.
    module = component.load_component(found[0], tensors, device="cpu", dtype=torch.float32, copy=True)
    identity = ",".join(file_identity(file) for file in tensors.files)
    base = header.signature(tensors.shapes)
    return Component(role, found[0].architecture, module, section.train, "" if section.train else identity, base)


def _from_scratch(role: str, section: ComponentRecipe) -> Component:
    declared, _ = _discovery.catalog().layouts()
    if section.architecture not in declared:
        near = did_you_mean(section.architecture, declared)
        raise TrainingError(f"[components.{role}]: architecture {section.architecture!r} is not installed{near}")
    architecture = declared[section.architecture]
    config_class = resolve(architecture.config)
    fields = [each.name for each in dataclasses.fields(config_class)]
    for key in section.config:
        if key not in fields:
            raise TrainingError(f"[components.{role}.config]: unknown key {key!r}{did_you_mean(key, fields)}")
    module = resolve(architecture.module)(config_class(**section.config))
    if section.init:
        resolve(section.init)(module)
    return Component(role, architecture, module, section.train, "")


def _freeze(component: Component, section: ComponentRecipe) -> None:
    component.module.requires_grad_(section.train)
    component.module.train(section.train)
    for pattern in section.freeze:
        names = [name for name, _ in component.module.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise TrainingError(f"[components.{component.role}]: freeze pattern {pattern!r} matches no parameter")
        for name in names:
            component.module.get_parameter(name).requires_grad_(False)
    trained = sum(parameter.numel() for _, parameter in component.trainable())
    total = sum(parameter.numel() for parameter in component.module.parameters())
    logger.info(
        "%s: %s, %.2fM parameters, %.2fM trained",
        component.role,
        component.architecture.name,
        total / 1e6,
        trained / 1e6,
    )
