"""Loading the components of a pipeline from files: all are recognised and checked before the first tensor is read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffsynth import _discovery
from diffsynth.core import device as devices
from diffsynth.core.loader import component, files, header, recognize
from diffsynth.core.loader.checkpoint import read_config
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.file_prefetcher import FilePrefetcher
from diffsynth.core.loader.reader.source import ComponentSource
from diffsynth.core.vram.block_weights import check_source
from diffsynth.core.vram.policy import Policy
from diffsynth.errors import MissingComponent, Unrecognized, did_you_mean
from diffsynth.runtime.memory_options import MemoryOptions, Policies
from diffsynth.runtime.role import Processor, Role, grouped, role_of
from diffsynth.spec import resolve

logger = logging.getLogger(__name__)

_PREFETCH_SHARE, _PREFETCH_BYTES = 0.25, 4 * 2**30
"""Limits of reading the next component ahead: it has only the time of one upload, and the upload needs host memory,
too."""


@dataclass(frozen=True)
class _Found:
    """A recognised component that is not loaded yet."""

    role: str
    recognized: recognize.Recognized
    header: header.Header
    config: ModelConfig


class PretrainedLoader:
    """Loads the components of a pipeline class.

    Args:
        roles: the roles to load.
        pipeline_name: for messages.
        choose: replaces the policy "auto", see `choose_before_reading`; None if no policy is "auto".
    """

    def __init__(
        self,
        roles: Mapping[str, Role | Processor],
        pipeline_name: str,
        choose: Callable[..., MemoryOptions] | None = None,
    ) -> None:
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
        self._check_processor_names(processor_configs)
        device = devices.default_device() if device is None else devices.check_device(device)
        options = MemoryOptions(device, dtype, vram_limit, policy)
        options.check_roles(self._roles)
        found = self._recognize(model_configs)
        missing = [
            name
            for name, role in self._roles.items()
            if not role.optional and all(role_of(part.role) != name for part in found)
        ]
        if missing:
            raise MissingComponent(
                f"{self._pipeline_name} needs {' and '.join(missing)}; the files given hold "
                f"{', '.join(part.role for part in found) or 'nothing'}. Add a ModelConfig for it to model_configs."
            )
        policies = [options.policy(part.role, part.config) for part in found]
        components, sources = self._load_processors(processor_configs)
        opened = [
            component.open_component(part.recognized, part.header, dtype=_dtype(policy, options))
            for part, policy in zip(found, policies, strict=True)
        ]
        if self._choose is not None:
            by_role = {part.role: pair for part, pair in zip(found, opened, strict=True)}
            options = self._choose(options, by_role, components, {part.role: part.config for part in found})
            policies = [options.policy(part.role, part.config) for part in found]
        for part, policy, (module, source) in zip(found, policies, opened, strict=True):
            if policy is not None:
                check_source(policy, source, type(module).__name__)
                options.check_limit(part.role, module, architecture=part.recognized.architecture, policy=policy)
        sources_ahead = [*(source for _, source in opened[1:]), None]
        for part, policy, (module, source), ahead in zip(found, policies, opened, sources_ahead, strict=False):
            started = time.perf_counter()
            if policy is not None:
                architecture = part.recognized.architecture
                components[part.role] = options.read(module, source, architecture=architecture, policy=policy)
            else:
                with _prefetched(ahead, options.device):
                    components[part.role] = component.materialize(module, source, device=options.device)
            sources[part.role] = list(part.header.files)
            _discovery.notify(
                "component_loaded",
                role=part.role,
                architecture=part.recognized.architecture.name,
                files=sources[part.role],
                seconds=time.perf_counter() - started,
            )
        return grouped(components), sources

    def _recognize(self, model_configs: Sequence[ModelConfig]) -> list[_Found]:
        architectures, checkpoints = _discovery.catalog().layouts()
        found: list[_Found] = []
        for config in model_configs:
            tensors = read_config(config, resolve=_resolve_source)
            for recognized in recognize.recognize(tensors, architectures, checkpoints):
                role = self._role_for(recognized, tensors, taken={part.role for part in found})
                found.append(_Found(role, recognized, tensors, config))
                _discovery.notify(
                    "checkpoint_recognized",
                    files=list(tensors.files),
                    architecture=recognized.architecture.name,
                    tier=recognized.tier,
                )
        return found

    def _role_for(self, recognized: recognize.Recognized, tensors: header.Header, taken: set[str]) -> str:
        name = recognized.architecture.name
        fitting = [role for role, need in self._roles.items() if name in need.architectures]
        for role in fitting:
            if self._roles[role].many:
                return f"{role}[{sum(role_of(each) == role for each in taken)}]"
            if role not in taken:
                return role
        where = ", ".join(str(file) for file in tensors.files) or "the given state_dict"
        if fitting:
            raise Unrecognized(
                f"{where}: a second {name}; role {fitting[0]} of {self._pipeline_name} is filled already"
            )
        wanted = "; ".join(f"{role}: {' or '.join(need.architectures)}" for role, need in self._roles.items())
        raise Unrecognized(
            f"{where}: this is a {name}, which {self._pipeline_name} has no role for. It takes {wanted}."
        )

    def _check_processor_names(self, configs: Mapping[str, ModelConfig | None]) -> None:
        known = [f"{role}_config" for role in self._processors]
        for name in configs:
            if name not in known:
                raise TypeError(
                    f"from_pretrained() of {self._pipeline_name} takes no {name!r}{did_you_mean(name, known)} "
                    f"Besides torch_dtype, device, model_configs, vram_limit, policy: {', '.join(known) or 'nothing'}"
                )

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
            components[role] = resolve(processor.loader).from_pretrained(folder, local_files_only=True)
            sources[role] = [folder]
        return components, sources


def _dtype(policy: Policy | None, options: MemoryOptions) -> torch.dtype:
    return options.dtype if policy is None else policy.computation.dtype or options.dtype


def _prefetched(source: ComponentSource | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that reads the files of `source` ahead; it does nothing for None or on the CPU.

    Loading to the CPU is limited by the disk already, so nothing is read ahead there.
    """
    if source is None or device.type == "cpu":
        return nullcontext()
    return FilePrefetcher(source, share=_PREFETCH_SHARE, most=_PREFETCH_BYTES)


def _resolve_source(source: str) -> list[Path] | None:
    return _discovery.first("resolve_source", source=source)
