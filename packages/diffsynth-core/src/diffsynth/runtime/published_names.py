"""State dicts under published names: `load_state_dict` of a loaded component takes every layout of its architecture."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize
from diffsynth.errors import Unrecognized
from diffsynth.spec import ArchitectureSpec


def accept_published_names(module: nn.Module, architecture: ArchitectureSpec) -> None:
    """Have `module.load_state_dict` take the names of every declared layout of the architecture, besides its own.

    Weights that were trained elsewhere have other names: `pipe.dit.load_state_dict(load_state_dict(file))` converts
    them as a file is converted. A state dict that no layout fits is left to torch, whose error names the keys. If
    weights of the module are on disk, `load_state_dict` raises ValueError, as there is no memory to copy to.

    Args:
        module: a component that was loaded.
        architecture: of the module.
    """
    module.register_load_state_dict_pre_hook(partial(_rename, architecture))


def _rename(
    architecture: ArchitectureSpec, module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Replace a state dict under published names by one under the names of the module."""
    if prefix:
        return
    own = module.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"load_state_dict of {type(module).__name__}: its weights are on disk and are read when they are needed. "
            "Give the file as ModelConfig(path=...) to from_pretrained, or load the pipeline without the policy disk"
        )
    if all(key in own for key in state_dict):
        return
    checkpoints = [each.spec for each in _discovery.catalog().checkpoints]
    named = [checkpoint for checkpoint in checkpoints if checkpoint.architecture == architecture.name]
    header = pickled.of_state_dict(dict(state_dict))
    try:
        (found,) = recognize.recognize(header, {architecture.name: architecture}, named)
    except Unrecognized:
        return
    dtype = next(module.parameters()).dtype
    _, source = component.open_component(found, header, dtype=dtype)
    weights = source.read(device="cpu")
    state_dict.clear()
    state_dict.update(weights)
