"""LoRAs of one branch of guidance: the call's arguments `positive_only_lora` and `negative_only_lora`.

The network's calls for a branch add them to the outputs of its layers; see `diffsynth.core.lora.scoped`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import files
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.lora import LoRA, read_lora
from diffsynth.core.lora.arithmetic import stacked
from diffsynth.core.lora.changes import LoRALayer
from diffsynth.core.lora.hot import hot_change
from diffsynth.core.lora.scoped import check_scoped, scoped
from diffsynth.errors import CheckpointError

BranchLoRA = str | Path | Mapping[str, Tensor] | None
"""The type of a call's arguments `positive_only_lora` and `negative_only_lora`."""

ARGUMENTS = ("positive_only_lora", "negative_only_lora")
"""The arguments, in the order of the two branches of guidance that they are for: `Guidance.branches`."""


def parse_branch_lora(name: str, value: Any) -> tuple[LoRA, ...] | None:
    """Return the LoRAs that an argument names, a tuple; None for None.

    Args:
        name: of the argument, for messages.
        value: a file or folder, a state dict, None, or a tuple that this function returned.

    Raises:
        TypeError: another type, or a dict with a value that is no tensor.
        CheckpointError: the file is missing or cannot be read; `KeyMismatch` if it is no LoRA.
    """
    if value is None or (isinstance(value, tuple) and all(isinstance(each, LoRA) for each in value)):
        return value
    if not isinstance(value, str | Path | Mapping):
        raise TypeError(f"{name}={value!r:.80}: expected the path of a LoRA, or a dict of its tensors")
    try:
        return (read_lora(value if isinstance(value, Mapping) else find_lora(ModelConfig(path=value))),)
    except (CheckpointError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error


def find_lora(config: ModelConfig) -> list[Path]:
    """Return a list of the files of a LoRA; errors are those of `diffsynth.core.loader.files.find`."""
    return files.find(config, resolve=lambda source: _discovery.first("resolve_source", source=source))


class BranchLoRASession:
    """The LoRAs of the branches of one call.

        with session:
            with session.in_branch("cond"):
                velocity = ...

    Args:
        loras: branch -> role -> the LoRAs that fit its component, under its names.
        parts: role -> component.
        device: the device that computes.
        atomic: role -> module classes that read the weights of their layers without calling the layers.

    Raises:
        ValueError: as for `diffsynth.core.lora.scoped.check_scoped`.
    """

    def __init__(
        self,
        loras: Mapping[str, Mapping[str, Sequence[LoRA]]],
        parts: Mapping[str, nn.Module],
        *,
        device: torch.device,
        atomic: Callable[[str], tuple[type, ...]],
    ) -> None:
        self._loras, self._parts, self._device = loras, parts, device
        for role, lora in ((role, lora) for roles in loras.values() for role, many in roles.items() for lora in many):
            check_scoped(parts[role], lora, atomic=atomic(role))
        self._layers: dict[str, dict[str, dict[str, LoRALayer]]] = {}

    @property
    def is_used(self) -> bool:
        """Whether any branch has a LoRA."""
        return bool(self._loras)

    def __enter__(self) -> BranchLoRASession:
        self._layers = {
            branch: {role: self._on_device(self._parts[role], loras) for role, loras in roles.items()}
            for branch, roles in self._loras.items()
        }
        return self

    def __exit__(self, *error: object) -> None:
        self._layers = {}

    @contextmanager
    def in_branch(self, branch: str) -> Iterator[None]:
        """Context manager in which the networks compute the LoRAs of a branch, in this thread alone."""
        with ExitStack() as stack:
            for role, layers in self._layers.get(branch, {}).items():
                stack.enter_context(scoped(self._parts[role], layers))
            yield

    def _on_device(self, module: nn.Module, loras: Sequence[LoRA]) -> dict[str, LoRALayer]:
        """Return a dict name of a layer -> the sum of its changes, on the device that computes."""
        changes = {}
        for name in dict.fromkeys(name for lora in loras for name in lora.layers):
            found = [lora.layers[name] for lora in loras if name in lora.layers]
            layer = module.get_submodule(name)
            changes[name] = stacked(name, [hot_change(module, layer, each, device=self._device) for each in found])
        return changes
