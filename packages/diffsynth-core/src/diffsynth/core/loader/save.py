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
from torch import nn


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

    The file appears whole or not at all.

    Args:
        architecture: name of its `ArchitectureSpec`.
        config: the dataclass it was built from.
        metadata: more of it; values are text.
        dtype: of floating tensors in the file; None keeps theirs.
    """
    path = Path(path)
    tensors = {
        name: tensor.detach().to("cpu", dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in module.state_dict().items()
    }
    notes = {
        **(metadata or {}),
        "format": "pt",
        "diffsynth.architecture": architecture,
        "diffsynth.config": json.dumps(dataclasses.asdict(config), sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=notes)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
