"""LoRAs beside the weights, which stay as they are: added whenever the layer runs, and taken away again.

A layer becomes an object of a subclass of its own class, in place: whoever holds it, the VRAM engine among them, still
holds it. Its matrices are non-persistent buffers. So keys of the state dict stay what they were, and the matrices go
where the module's buffers go: with `.to()`, and with the stages of a wrapped module, whose plans count them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.core import forward_chain
from diffsynth.core.lora.arithmetic import stacked
from diffsynth.core.lora.layer import LoRA, LoRALayer
from diffsynth.core.vram.managed import managed

_FLOAT8 = 1
"""Bytes of an element below which a dtype is for storage alone."""


class LoRAHotLoadMixin:
    """A linear layer with a LoRA beside it: `y = layer(x) + (x A^T) B^T`.

    Several LoRAs are one whose rank is the sum of theirs: one pair of products, however many there are.
    """

    lora_down: Tensor
    """`rank inputs`."""
    lora_up: Tensor
    """`outputs rank`, strength and alpha within."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own output and the LoRA's."""
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return output + self.lora_forward(x).to(output.dtype)

    def lora_forward(self, x: Tensor) -> Tensor:
        """The LoRA's part of the output."""
        inner = functional.linear(x, self.lora_down.to(x.dtype))
        return functional.linear(inner, self.lora_up.to(x.dtype))


def add_hot(module: nn.Module, lora: LoRA, alpha: float = 1.0, *, atomic: tuple[type, ...] = ()) -> None:
    """Put a LoRA beside a module's layers, and beside what is there already. Call it between stages, not in one.

    Args:
        module: that `fit` fitted the LoRA to; it may be wrapped by the VRAM engine, wherever its weights wait.
        lora: named as the module's layers.
        alpha: its strength.
        atomic: classes that read weights of layers in them without calling those.

    Raises:
        ValueError: a layer that would not notice: one inside an atomic class, or compiled by itself.
    """
    parts = {name: module.get_submodule(name) for name in lora.layers}
    for name, part in parts.items():
        _check(module, name, part, atomic)
    held = managed(module)
    if held is not None:
        held.leave()
    for name, part in parts.items():
        weight = part.weight
        device = weight.device if held is None else torch.device("cpu")
        dtype = (held.policy.computation.dtype if held is not None else None) or weight.dtype
        if dtype.itemsize <= _FLOAT8:
            dtype = torch.bfloat16
        layer = lora.layers[name]
        earlier = [LoRALayer(part.lora_down, part.lora_up)] if isinstance(part, LoRAHotLoadMixin) else []
        new = LoRALayer(layer.down.to(device, dtype), layer.scaled_up(alpha).to(device, dtype))
        whole = stacked(name, [*earlier, new])
        if not earlier:
            _become(part, _with_lora(type(part)))
        part.register_buffer("lora_down", whole.down, persistent=False)
        part.register_buffer("lora_up", whole.up, persistent=False)
    _forget_compiled(module)


def clear_hot(module: nn.Module) -> int:
    """Take away every LoRA that is beside a module's layers; gives how many layers had one. No weight was changed."""
    held = managed(module)
    if held is not None and is_hot(module):
        held.leave()
    changed = [part for part in module.modules() if isinstance(part, LoRAHotLoadMixin)]
    for part in changed:
        del part.lora_down, part.lora_up
        _become(part, type(part).__mro__[2])
    _forget_compiled(module)
    return len(changed)


def is_hot(module: nn.Module) -> bool:
    """Whether a layer of a module has a LoRA beside it."""
    return any(isinstance(part, LoRAHotLoadMixin) for part in module.modules())


@functools.cache
def _with_lora(layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"LoRA{layer.__name__}", (LoRAHotLoadMixin, layer), {"__module__": layer.__module__})


def _become(part: nn.Module, kind: type[nn.Module]) -> None:
    part.__class__ = kind
    forward_chain.class_changed(part)


def _forget_compiled(module: nn.Module) -> None:
    # Graphs of torch 2.11 are not guarded by the classes of the layers in them, and would run on without the LoRA.
    if any(map(forward_chain.is_compiled, module.modules())):
        torch.compiler.reset()


def _check(module: nn.Module, name: str, part: nn.Module, atomic: tuple[type, ...]) -> None:
    parents = [module.get_submodule(name[:end]) for end, char in enumerate(name) if char == "."]
    # torch's own attention reads the weight of its output projection, whose class says so by its long name.
    inside = next((each for each in parents if isinstance(each, (nn.MultiheadAttention, *atomic))), None)
    if inside is not None:
        raise ValueError(
            f"{name} is inside a {type(inside).__name__}, which reads its weight without calling it, so a hot LoRA "
            "would do nothing. Use hotload=False"
        )
    if forward_chain.is_compiled(part):
        raise ValueError(f"{name} is compiled by itself; load hot LoRAs before compile_pipeline()")
