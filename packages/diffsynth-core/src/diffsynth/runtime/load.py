"""`diffsynth.load`: loading a model by name."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffsynth import registry
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.progress import OnProgress
from diffsynth.errors import did_you_mean, shown
from diffsynth.runtime.composition import compose
from diffsynth.runtime.memory_options import Policies, for_call
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.role import Processor, Role, check_component_names, role_of
from diffsynth.spec import resolve


def load(
    name: str,
    *,
    components: Mapping[str, ModelConfig | Path | str | Sequence[ModelConfig]] | None = None,
    device: torch.device | str | None = None,
    torch_dtype: torch.dtype = torch.bfloat16,
    vram_limit: float | None = None,
    policy: Policies = None,
    quantize: Any = None,
    base_path: Path | str | None = None,
    warmup: bool | Mapping[str, Any] = False,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> Pipeline:
    """Return the `Pipeline` of a model, loaded from the files that the model names; roles it has no file for are None.

    Args:
        name: a model's name or hub id, any case; `plugin:name` where two plugins declare one name.
        components: role -> a file to use instead of the model's own, or for a role that it has no file for: a path, a
            source `scheme://location`, or a `ModelConfig`; of a role of many, such as "controlnet", also a list of
            `ModelConfig`s. The role must accept the architecture of the file.
        device: the device that computes; None picks the first accelerator, else the CPU.
        torch_dtype: of parameters and activations.
        vram_limit: GiB that a call may take on the device; None is no limit.
        policy: where and in which dtype weights are offloaded; see `Pipeline.from_pretrained`.
        quantize: how linear layers are quantized: for the networks of the denoising loop what `ModelConfig(quantize=)`
            takes, such as "fp8_row"; or a dict role -> that, for these roles.
        base_path: folder of model files, also for downloads; None is DIFFSYNTH_MODEL_BASE_PATH, else `./models`.
        warmup: whether a call of two steps is made before the first request, see `Pipeline.warmup`; a dict has the
            arguments of that call, such as an image that the model needs.
        on_progress: called with a `diffsynth.core.progress.Progress` while files are downloaded and read.
        cancel: checked between files and blocks of files; when set, `Cancelled` is raised. Nothing stays in memory, and
            files that were downloaded completely are kept.

    Raises:
        UnknownModel: no installed plugin declares the name; the message has the nearest spelling.
        CheckpointError: files are missing, or do not fit their roles.
        Cancelled: the caller set `cancel`.
        ValueError: `quantize` names an unknown method, or a role that has no file.
        TypeError: `components` is no dict, names a role that the pipeline does not have or that holds no module, or
            has another value than a file.
    """
    record = registry.get(name)
    folder: dict[str, Any] = {} if base_path is None else {"local_model_path": str(base_path)}
    cls: type[Pipeline] = resolve(record.pipeline)
    configs = {role: ModelConfig.from_source(source, **folder) for role, source in record.components.items()}
    roles = compose(cls).roles
    if not isinstance(warmup, bool | Mapping):
        raise TypeError(f"warmup={shown(warmup)}: expected True, False, or a dict argument -> value")
    if not isinstance(components, Mapping | None):
        raise TypeError(f"components={shown(components)}: expected a dict role -> file")
    given = _members(components or {}, roles)
    check_component_names(given, roles, pipeline_name=cls.__name__)
    configs |= {role: _config(role, file) for role, file in given.items()}
    by_role = _quantize_by_role(quantize, compose(cls).loop_roles, configs)
    configs |= {role: replace(configs[role], quantize=wanted) for role, wanted in by_role.items()}
    pipe = cls.from_pretrained(
        torch_dtype=torch_dtype,
        device=device,
        model_configs=[replace(config, role=role_of(name)) for name, config in configs.items()],
        vram_limit=vram_limit,
        policy=for_call(policy, record.defaults),
        on_progress=on_progress,
        cancel=cancel,
        **{f"{role}_config": ModelConfig.from_source(source, **folder) for role, source in record.processors.items()},
    )
    pipe.named(record.name, record.defaults)
    if warmup is not False:
        pipe.warmup(**{"on_progress": on_progress, "cancel": cancel, **({} if warmup is True else warmup)})
    return pipe


def _quantize_by_role(quantize: Any, loop_roles: Sequence[str], configs: Mapping[str, ModelConfig]) -> dict[str, Any]:
    """Return a dict role -> `quantize` of its `ModelConfig`; raises like `load`."""
    if quantize is None:
        return {}
    if not isinstance(quantize, Mapping) or "method" in quantize:
        return {role: quantize for role in configs if role_of(role) in loop_roles}
    for role in quantize:
        if role not in configs:
            raise ValueError(
                f"quantize for {role!r}, which has no file{did_you_mean(str(role), configs)} {', '.join(configs)}"
            )
    return dict(quantize)


def _members(components: Mapping[str, Any], roles: Mapping[str, Role | Processor]) -> dict[str, Any]:
    """Return `components` with "controlnet[0]", "controlnet[1]" for a role of many that has a list of configs."""
    found: dict[str, Any] = {}
    for name, file in components.items():
        need = roles.get(name)
        several = isinstance(file, list | tuple) and any(isinstance(each, ModelConfig) for each in file)
        if several and isinstance(need, Role) and need.many:
            found |= {f"{name}[{index}]": each for index, each in enumerate(file)}
        else:
            found[name] = file
    return found


def _config(role: str, file: Any) -> ModelConfig:
    if isinstance(file, ModelConfig):
        return file
    paths = file if isinstance(file, list | tuple) else [file]
    if not paths or not all(isinstance(each, str | Path) for each in paths):
        raise TypeError(
            f"components[{role!r}] is {shown(file)}; expected a path, a ModelConfig, or the paths of one checkpoint's "
            f"files. A loaded module goes to from_components()"
        )
    return ModelConfig.from_source(file) if isinstance(file, str) and "://" in file else ModelConfig(path=file)
