"""Writing a component so that we read it back without guessing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth.core.loader.recognize import ARCHITECTURE_KEY, CONFIG_KEY


def save_component(
    module: nn.Module,
    path: Path | str,
    *,
    architecture: str,
    config: Any,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a module as safetensors under its own names, with its architecture and config in the metadata.

    The file appears whole or not at all. Parameters that share memory are written once each.

    Args:
        architecture: name of its `ArchitectureSpec`.
        config: the dataclass it was built from.
        metadata: more of it; values are text.
        dtype: of floating tensors in the file; None keeps theirs.

    Raises:
        ValueError: metadata that says what this function says, or a parameter without data.
    """
    path = Path(path)
    if taken := [key for key in metadata or {} if key == "format" or key in (ARCHITECTURE_KEY, CONFIG_KEY)]:
        raise ValueError(f"metadata has {taken[0]!r}, which save_component writes itself; leave it out")
    tensors = _tensors(module, dtype)
    notes = {
        **(metadata or {}),
        "format": "pt",
        ARCHITECTURE_KEY: architecture,
        CONFIG_KEY: json.dumps(dataclasses.asdict(config), sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=notes)
        partial.chmod(_usual_mode())  # safetensors writes files that only their owner may read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _usual_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _tensors(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} of {type(module).__name__} is on the meta device: there is nothing to save")
        lowered = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        made = tensor.detach().to("cpu", lowered).contiguous()
        # safetensors refuses tensors that share memory, as tied weights do.
        if made.untyped_storage().data_ptr() in seen:
            made = made.clone()
        seen.add(made.untyped_storage().data_ptr())
        tensors[name] = made
    return tensors
