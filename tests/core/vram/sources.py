"""A module's weights in a file, as the loader would hand them on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth.core.loader import convert, header
from diffsynth.core.loader.reader.source import ComponentSource


def on_disk(module: nn.Module, folder: Path) -> ComponentSource:
    """Writes the state dict, without what is tied, and gives its source."""
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    found = header.read([folder / "model.safetensors"])
    targets = convert.plan((), found.shapes).targets
    return ComponentSource(found, targets, {name: tensor.dtype for name, tensor in tensors.items()})


def emptied(module: nn.Module) -> nn.Module:
    """The module with its parameters on meta; its buffers stay."""
    seen: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = seen.setdefault(
                    id(parameter), nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                )
                part._parameters[name] = empty
    return module
