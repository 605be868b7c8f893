"""Loading the components of a pipeline from files: all are recognised and checked before the first tensor is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth import _discovery
from diffsynth.core import device as devices
from diffsynth.core import progress
from diffsynth.core.loader import component, files, header, recognize
from diffsynth.core.loader.checkpoint import read_config
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.file_prefetcher import FilePrefetcher
from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.quant.modules import quantized_source
from diffsynth.core.vram.block_weights import check_source
from diffsynth.core.vram.policy import Policy
from diffsynth.errors import MissingComponent, Unrecognized, did_you_mean, shown
from diffsynth.runtime import architectures
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.memory_options import MemoryOptions, Policies
from diffsynth.runtime.published_names import accept_published_names
from diffsynth.runtime.role import Agreement, Processor, Role, check_agreements, grouped, load_processor, role_of
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_PREFETCH_SHARE, _PREFETCH_BYTES = 0.25, 4 * 2**30
"""Limits of reading the next component ahead: it has only the time of one upload, and the upload needs host memory,
too."""


_ARGUMENTS = ("torch_dtype", "device", "model_configs", "vram_limit", "policy", "on_progress", "cancel")


@dataclass(frozen=True)
class _Found:
    """A recognised component that is not loaded yet."""

    role: str
    recognized: recognize.Recognized
    header: header.Header
    config: ModelConfig


@dataclass(frozen=True)
class _File:
    """A checkpoint whose header was read, and the components that are in it."""

    source: ModelConfig
    header: header.Header
    components: Sequence[recognize.Recognized]

    @classmethod
    def open(cls, source: ModelConfig) -> _File:
        """Return a `_File` of the checkpoint that `source` names; no tensor is read."""
        tensors = read_config(source, resolve=_resolve_source)
        return cls(source, tensors, recognize.recognize(tensors, *_discovery.catalog().layouts()))


class PretrainedLoader:
    """Loads the components of a pipeline class.

    Args:
        roles: the roles to load.
        pipeline_name: for messages.
        choose: replaces the policy "auto", see `choose_before_reading`; None if no policy is "auto".
        agreements: the config fields that must be equal.
        features: those of the pipeline; files for one that is `alone` need no others.
    """

    def __init__(
        self,
        roles: Mapping[str, Role | Processor],
        pipeline_name: str,
        choose: Callable[..., MemoryOptions] | None = None,
        *,
        agreements: Sequence[Agreement] = (),
        features: Sequence[Feature] = (),
    ) -> None:
        self._agreements, self._features = agreements, features
        self._choose = choose
        self._roles = {name: role for name, role in roles.items() if isinstance(role, Role)}
        self._processors = {name: role for name, role in roles.items() if isinstance(role, Processor)}
        self._pipeline_name = pipeline_name

    def load(
        self,
        model_configs: Sequence[ModelConfig],
        processor_configs: Mapping[str, ModelConfig | None],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None,
        vram_limit: float | None = None,
        policy: Policies = None,
    ) -> tuple[dict[str, Any], dict[str, list[Path]]]:
        """Load a pipeline's components; return (dict role -> component, or tuple for a role of many, dict role ->
        list of `Path`s it was read from; each member of a role of many has its own).

        No tensor is read before all files are recognised and checked. Arguments and errors are those of
        `Pipeline.from_pretrained`.
        """
        self._check_configs(model_configs, processor_configs)
        device = devices.default_device() if device is None else devices.check_device(device)
        options = MemoryOptions(device, dtype, vram_limit, policy)
        options.check_roles(self._roles)
        found = self._recognize(model_configs)
        missing = self._check_complete(found)
        policies = [options.policy(part.role, part.config) for part in found]
        components, sources = self._load_processors(processor_configs)
        components |= dict.fromkeys(missing)
        opened = [_open(part, policy, options) for part, policy in zip(found, policies, strict=True)]
        configs = {part.role: getattr(module, "config", None) for part, (module, _) in zip(found, opened, strict=True)}
        check_agreements(self._agreements, configs, pipeline_name=self._pipeline_name)
        if self._choose is not None:
            by_role = {part.role: pair for part, pair in zip(found, opened, strict=True)}
            options = self._choose(options, by_role, components, {part.role: part.config for part in found})
            policies = [options.policy(part.role, part.config) for part in found]
        for part, policy, (module, source) in zip(found, policies, opened, strict=True):
            if policy is not None:
                check_source(policy, source, type(module).__name__)
                options.check_limit(part.role, module, architecture=part.recognized.architecture, policy=policy)
        self._read(found, policies, opened, options, into=components, sources=sources)
        return grouped(components), sources

    def _read(
        self,
        found: Sequence[_Found],
        policies: Sequence[Policy | None],
        opened: Sequence[tuple[nn.Module, WeightSource]],
        options: MemoryOptions,
        *,
        into: dict[str, Any],
        sources: dict[str, list[Path]],
    ) -> None:
        """Read the weights of the components, and write them and their files to `into` and `sources`, by role."""
        sources_ahead = [*(source for _, source in opened[1:]), None]
        sizes = [
            0 if policy is not None and policy.offload.on_disk else source.size()
            for policy, (_, source) in zip(policies, opened, strict=True)
        ]
        with progress.task("load", total=sum(sizes), unit="bytes", description=found[0].role if found else "") as task:
            for index, (part, policy, (module, source)) in enumerate(zip(found, policies, opened, strict=True)):
                task.describe(part.role)
                # Weights that are quantized while they are read take more bytes of the file than of the module.
                task.bound(sum(sizes[: index + 1]))
                started = time.perf_counter()
                if policy is not None:
                    architecture = part.recognized.architecture
                    into[part.role] = options.read(module, source, architecture=architecture, policy=policy)
                else:
                    with _prefetched(sources_ahead[index], options.device):
                        into[part.role] = component.materialize(module, source, device=options.device)
                task.reach(sum(sizes[: index + 1]))
                accept_published_names(into[part.role], part.recognized.architecture)
                sources[part.role] = list(part.header.files)
                _discovery.notify(
                    "component_loaded",
                    role=part.role,
                    architecture=part.recognized.architecture.name,
                    files=sources[part.role],
                    seconds=time.perf_counter() - started,
                )

    def _check_complete(self, found: Sequence[_Found]) -> list[str]:
        """Return a list of the roles that are not optional and stay empty, because what was found is for a feature that
        is used alone.

        Raises:
            MissingComponent: no file fills a role that the pipeline needs.
        """
        loaded = [role_of(part.role) for part in found]
        missing = [name for name, role in self._roles.items() if not role.optional and name not in loaded]
        if missing and not any(feature.is_alone(loaded) for feature in self._features):
            raise MissingComponent(
                f"{self._pipeline_name} needs {' and '.join(missing)}; the files given hold "
                f"{', '.join(part.role for part in found) or 'nothing'}. Add a ModelConfig for it to model_configs."
            )
        return missing

    def _recognize(self, model_configs: Sequence[ModelConfig]) -> list[_Found]:
        found: list[_Found] = []
        read: list[_File] = []
        named = self._named_roles(model_configs)
        for config in model_configs:
            progress.raise_if_stopped()
            # A model names a file of several components once for each of its roles.
            source = replace(config, role=None)
            file = next((each for each in read if config.state_dict is None and each.source == source), None)
            if file is None:
                read.append(file := _File.open(source))
            tensors, components = file.header, list(file.components)
            if config.role is not None and not any(each.architecture.not_runnable for each in components):
                components = [self._component_for(config.role, components, tensors)]
            for recognized in components:
                recognized.require_runnable(_where(tensors))
                taken = named | {part.role: f"a {part.recognized.architecture.name}" for part in found}
                role = config.role or self._role_for(recognized, tensors, taken=taken)
                if self._roles[role].many:
                    role = f"{role}[{sum(role_of(part.role) == role for part in found)}]"
                found.append(_Found(role, recognized, tensors, config))
                _discovery.notify(
                    "checkpoint_recognized",
                    files=list(tensors.files),
                    architecture=recognized.architecture.name,
                    tier=recognized.tier,
                )
        return found

    def _named_roles(self, model_configs: Sequence[ModelConfig]) -> dict[str, str]:
        """Return a dict with the roles that the configs name, as role -> "another file".

        Raises:
            ValueError: a config names a role that the pipeline does not have, or that another one names, too.
        """
        names = [config.role for config in model_configs if config.role is not None]
        for role in names:
            if role not in self._roles:
                raise ValueError(
                    f"a ModelConfig has role={role!r}, no role of a module in {self._pipeline_name}"
                    f"{did_you_mean(role, self._roles)} Its roles: {', '.join(self._roles)}"
                )
            if names.count(role) > 1 and not self._roles[role].many:
                raise ValueError(f"{names.count(role)} ModelConfigs have role={role!r}; expected one")
        return dict.fromkeys(names, "another file")

    def _component_for(
        self, role: str, components: Sequence[recognize.Recognized], tensors: header.Header
    ) -> recognize.Recognized:
        """Return the `Recognized` of a file's components that the role takes; the file's others are not loaded.

        Raises:
            Unrecognized: the role takes none of them, or several.
        """
        fitting = [each for each in components if self._roles[role].accepts(each.architecture)]
        if len(fitting) != 1:
            names = " and ".join(f"a {each.architecture.name}" for each in fitting or components)
            others = [
                name
                for name, need in self._roles.items()
                if name != role and any(need.accepts(each.architecture) for each in components)
            ]
            remedy = f"give the file to role {' or '.join(others)}" if others else "load a file that is made for it"
            raise Unrecognized(
                f"{_where(tensors)}: this is {names}; role {role} of {self._pipeline_name} takes one "
                f"{' or '.join(self._roles[role].architectures)}; {remedy}"
            )
        if len(components) > 1:
            logger.info("%s: of it, the %s is loaded, for role %s", _where(tensors), fitting[0].architecture.name, role)
        return fitting[0]

    def _role_for(self, recognized: recognize.Recognized, tensors: header.Header, taken: Mapping[str, str]) -> str:
        """Return the name of the role that a component fills: the first free one of those that accept its architecture
        by its own name, else of those that accept it by a name in `accepted_as`.

        Raises:
            Unrecognized: no role accepts it, all that do are `taken` (role -> what fills it), or roles of different
                kinds accept it.
        """
        architecture, where = recognized.architecture, _where(tensors)
        exact = [role for role, need in self._roles.items() if architecture.name in need.architectures]
        fitting = exact or [role for role, need in self._roles.items() if need.accepts(architecture)]
        free = [role for role in fitting if role not in taken or self._roles[role].many]
        if not exact and len({self._roles[role].architectures for role in free}) > 1:
            raise Unrecognized(
                f"{where}: this is a {architecture.name}, which roles {' and '.join(free)} of {self._pipeline_name} "
                f"accept alike; name one of them: ModelConfig(..., role={free[0]!r})"
            )
        if free:
            return free[0]
        if fitting:
            holder = taken[fitting[0]]
            article = "a second" if holder == f"a {architecture.name}" else "a"
            raise Unrecognized(
                f"{where}: {article} {architecture.name}; role {fitting[0]} of {self._pipeline_name} is filled "
                f"already, by {holder}"
            )
        wanted = "; ".join(f"{role}: {' or '.join(need.architectures)}" for role, need in self._roles.items())
        raise Unrecognized(
            f"{where}: this is a {architecture.name}, which {self._pipeline_name} has no role for. It takes {wanted}."
        )

    def _check_processor_names(self, configs: Mapping[str, ModelConfig | None]) -> None:
        known = [f"{role}_config" for role in self._processors]
        for name in configs:
            if name not in known:
                raise TypeError(
                    f"from_pretrained() of {self._pipeline_name} takes no {name!r}"
                    f"{did_you_mean(name, [*known, *_ARGUMENTS]) or '.'} "
                    f"It takes {', '.join((*_ARGUMENTS, *known))}; vram_limit and policy are all there is for memory"
                )

    def _check_configs(
        self, model_configs: Sequence[ModelConfig], processor_configs: Mapping[str, ModelConfig | None]
    ) -> None:
        self._check_processor_names(processor_configs)
        if not isinstance(model_configs, list | tuple):
            raise TypeError(f"model_configs={shown(model_configs)}: expected a list of ModelConfigs")
        named = {f"model_configs[{index}]": each for index, each in enumerate(model_configs)}
        named |= {name: each for name, each in processor_configs.items() if each is not None}
        for name, config in named.items():
            if not isinstance(config, ModelConfig):
                how = f"; ModelConfig({str(config)!r})" if isinstance(config, str | Path) else ""
                raise TypeError(f"{name} is {shown(config)}; expected a ModelConfig{how}")

    def _load_processors(
        self, configs: Mapping[str, ModelConfig | None]
    ) -> tuple[dict[str, Any], dict[str, list[Path]]]:
        components: dict[str, Any] = {}
        sources: dict[str, list[Path]] = {}
        for role, processor in self._processors.items():
            config = configs.get(f"{role}_config")
            if config is None:
                if processor.optional:
                    continue
                config = ModelConfig.from_source(processor.source)
            folder = files.find(config, resolve=_resolve_source)[0]
            components[role] = load_processor(role, processor, folder)
            sources[role] = [folder]
        return components, sources


def _where(tensors: header.Header) -> str:
    return ", ".join(str(file) for file in tensors.files) or "the given state_dict"


def _open(part: _Found, policy: Policy | None, options: MemoryOptions) -> tuple[nn.Module, WeightSource]:
    """Return (module on meta, source of its weights) of a component; both are of quantized layers if its config says
    so.
    """
    module, source = component.open_component(part.recognized, part.header, dtype=_dtype(policy, options))
    if part.config.quantize is None:
        return module, source
    if part.config.role is None and part.recognized.prefix:
        raise ValueError(
            f"quantize is set for {_where(part.header)}, which has several components; name the one to quantize: "
            f"ModelConfig(..., role={part.role!r})"
        )
    cut = architectures.cuts(part.recognized.architecture)
    which = {"atomic": cut["atomic"], "high_precision": cut["high_precision"]}
    return module, quantized_source(module, source, part.config.quantize, device=options.device, **which)


def _dtype(policy: Policy | None, options: MemoryOptions) -> torch.dtype:
    return options.dtype if policy is None else policy.computation.dtype or options.dtype


def _prefetched(source: WeightSource | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that reads the files of `source` ahead; it does nothing for None or on the CPU.

    Loading to the CPU is limited by the disk already, so nothing is read ahead there.
    """
    if source is None or device.type == "cpu":
        return nullcontext()
    return FilePrefetcher(source, share=_PREFETCH_SHARE, most=_PREFETCH_BYTES)


def _resolve_source(source: str) -> list[Path] | None:
    return _discovery.first("resolve_source", source=source)
