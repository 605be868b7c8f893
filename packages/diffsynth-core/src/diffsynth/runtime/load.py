"""`diffsynth.load`: loading a model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffsynth import registry
from diffsynth.core.loader.config import ModelConfig
from diffsynth.runtime.memory_options import Policies, for_call
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.spec import resolve


def load(
    name: str,
    *,
    device: torch.device | str | None = None,
    torch_dtype: torch.dtype = torch.bfloat16,
    vram_limit: float | None = None,
    policy: Policies = None,
    base_path: Path | str | None = None,
) -> Pipeline:
    """Return the `Pipeline` of a model, loaded from the files that the model names; roles it has no file for are None.

    Args:
        name: a model's name or hub id, any case; `plugin:name` where two plugins declare one name.
        device: the device that computes; None picks the first accelerator, else the CPU.
        torch_dtype: of parameters and activations.
        vram_limit: GiB that a call may take on the device; None is no limit.
        policy: where and in which dtype weights are offloaded; see `Pipeline.from_pretrained`.
        base_path: folder of model files, also for downloads; None is DIFFSYNTH_MODEL_BASE_PATH, else `./models`.

    Raises:
        UnknownModel: no installed plugin declares the name; the message has the nearest spelling.
        CheckpointError: files are missing or do not fit.
    """
    record = registry.get(name)
    folder: dict[str, Any] = {} if base_path is None else {"local_model_path": str(base_path)}
    cls: type[Pipeline] = resolve(record.pipeline)
    # A file may hold several components.
    sources = dict.fromkeys(record.components.values())
    pipe = cls.from_pretrained(
        torch_dtype=torch_dtype,
        device=device,
        model_configs=[ModelConfig.from_source(source, **folder) for source in sources],
        vram_limit=vram_limit,
        policy=for_call(policy, record.defaults),
        **{f"{role}_config": ModelConfig.from_source(source, **folder) for role, source in record.processors.items()},
    )
    return pipe.named(record.name, record.defaults)
