"""LoRAs of one call: added in one branch of guidance, without a change of the pipeline.

`diffsynth.core.lora.scoped` adds them. LoRAs that stay until they are removed are loaded by `Pipeline.load_lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.lora import LoRA, LoRALayer, fit, read_lora
from diffsynth.core.lora.scoped import check_scoped, scoped
from diffsynth.runtime.architectures import architecture_of, cuts


@dataclass(frozen=True, eq=False)
class CallLoRA:
    """A LoRA of one call and one branch of guidance, for `Pipeline.velocity` to enter: `with lora.of(self.dit):`.

    Args:
        state_dict: its tensors, with the names of a file in any usual form.
        device: the device on which the network computes.
        dtype: dtype of the matrices, at least 16 bits wide.
    """

    state_dict: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    _fitted: dict[nn.Module, dict[str, LoRALayer]] = field(default_factory=dict, init=False, repr=False)

    def of(self, network: nn.Module) -> AbstractContextManager[None]:
        """Return a context manager, inside of which the network has the LoRA in this thread.

        Raises:
            KeyMismatch, ValueError: as for `fit_for_call`.
        """
        if network not in self._fitted:
            self._fitted[network] = {
                name: LoRALayer(change.down.to(self.device, self.dtype), change.scaled_up().to(self.device, self.dtype))
                for name, change in fit_for_call(network, self.state_dict).layers.items()
            }
        return scoped(network, self._fitted[network])


def fit_for_call(network: nn.Module, state_dict: Mapping[str, Tensor]) -> LoRA:
    """Return the `LoRA` in `state_dict` under the names of a network's layers, for one call.

    Args:
        network: a component of a pipeline.
        state_dict: tensors of a LoRA.

    Raises:
        KeyMismatch: it is no LoRA, or some of it does not fit the network.
        ValueError: it changes what can only be fused, or the network is compiled.
    """
    architecture = architecture_of(network)
    checkpoints = _discovery.catalog().layouts()[1]
    name = "" if architecture is None else architecture.name
    fitted = fit(read_lora(state_dict), network, checkpoints, architecture=name)
    check_scoped(network, fitted, atomic=cuts(architecture)["atomic"])
    return fitted
