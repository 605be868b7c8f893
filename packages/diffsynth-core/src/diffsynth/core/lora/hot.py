"""Hot (unfused) LoRAs: added to a layer's output whenever it runs, and removable. The weights are not changed.

A layer's class is replaced by a subclass of itself, in place, so that every reference to the layer stays valid. The
matrices are non-persistent buffers: the state dict keeps its keys, and the matrices move with the module's buffers, by
`.to()` and between the stages of a wrapped module, whose plans count them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.core import forward_chain
from diffsynth.core.lora.applied import Applied, forget_hot, remember, require_new
from diffsynth.core.lora.arithmetic import stacked
from diffsynth.core.lora.changes import LoRALayer
from diffsynth.core.lora.format import LoRA
from diffsynth.core.vram.managed import managed
from diffsynth.errors import shortened


class LoRAHotLoadMixin:
    """A linear layer with a hot LoRA: `y = layer(x) + (x A^T) B^T`.

    Several LoRAs of one layer are stored as one, whose rank is the sum of theirs.
    """

    beside_weights = "a hot LoRA (load it with hotload=False, or remove it with clear_lora())"
    """Name of the part that is in no parameter, for `save_checkpoint`, which refuses such a layer."""
    lora_down: Tensor
    """Matrix A, of shape `rank inputs`."""
    lora_up: Tensor
    """Matrix B, of shape `outputs rank`, multiplied by all factors."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's own output for `x` plus what the LoRA adds to it, a tensor in the output's dtype."""
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return with_change(output, x, self.lora_down, self.lora_up)


def with_change(output: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the output of a linear layer for `x` plus what a LoRA adds to it, `(x A^T) B^T`, in the output's dtype.

    Args:
        output: of the layer alone, `... outputs`.
        x: the layer's input, `... inputs`.
        down: matrix A, `rank inputs`.
        up: matrix B, `outputs rank`.
    """
    inner = functional.linear(x, down.to(x.dtype))
    return output + functional.linear(inner, up.to(x.dtype)).to(output.dtype)


def add_hot(module: nn.Module, lora: LoRA, alpha: float = 1.0, *, atomic: tuple[type, ...] = ()) -> None:
    """Add `lora`, multiplied by `alpha`, as a hot LoRA (added to the outputs of layers, not to weights) to layers of
    `module`, beside those that they have; a running stage of the module ends.

    Not to be called inside a stage.

    Args:
        module: the module that `fit` fitted the LoRA to; it may be wrapped by the VRAM engine under any policy.
        lora: a LoRA with the names of the module's layers.
        alpha: factor of the LoRA.
        atomic: module classes that read the weights of their layers without calling the layers.

    Raises:
        ValueError: a layer whose forward is not called: one inside an atomic class, or compiled by itself; a LoRA with
            changes that `not_hot` names; or the module has this LoRA already.
    """
    mark = check_hot(module, lora, atomic=atomic)
    layers = {name: module.get_submodule(name) for name in lora.layers}
    engine = managed(module)
    if engine is not None:
        engine.leave()
    for name, layer in layers.items():
        device = layer.weight.device if engine is None else torch.device("cpu")
        earlier = [LoRALayer(layer.lora_down, layer.lora_up)] if isinstance(layer, LoRAHotLoadMixin) else []
        total = stacked(name, [*earlier, hot_change(module, layer, lora.layers[name], alpha, device=device)])
        if not earlier:
            _set_class(layer, _with_lora(type(layer)))
        layer.register_buffer("lora_down", total.down, persistent=False)
        layer.register_buffer("lora_up", total.up, persistent=False)
    remember(module, mark, Applied(alpha, hot=True))
    _reset_compiled(module)


def hot_change(
    module: nn.Module, layer: nn.Module, change: LoRALayer, alpha: float = 1.0, *, device: torch.device
) -> LoRALayer:
    """Return the matrices of `change` as a layer of `module` computes them beside its weight: on `device`, in the dtype
    of the layer's computation, all factors in matrix B.

    Args:
        module: the module, which may be wrapped by the VRAM engine.
        layer: the linear layer.
        change: of the layer's weight.
        alpha: factor of the change.
        device: of the matrices.
    """
    engine = managed(module)
    own = getattr(layer, "dtype", layer.weight.dtype)  # a quantized layer states the dtype that it had before
    dtype = (engine.policy.computation.dtype if engine is not None else None) or own
    if dtype.itemsize < 2:
        dtype = torch.bfloat16  # fp8 is a storage dtype: matrices of it would lose too much
    return LoRALayer(change.down.to(device, dtype), change.scaled_up(alpha).to(device, dtype))


def check_hot(module: nn.Module, lora: LoRA, *, atomic: tuple[type, ...] = ()) -> Hashable:
    """Return the fingerprint of `lora`; raise ValueError if it cannot be hot. Arguments and errors: see `add_hot`."""
    if reason := not_hot(lora):
        raise ValueError(f"{reason}. Use hotload=False, which fuses it into the weights")
    check_layers(module, lora, atomic=atomic)
    return require_new(module, lora)


def check_layers(module: nn.Module, lora: LoRA, *, atomic: tuple[type, ...] = ()) -> None:
    """Raise ValueError if the forward of a layer that `lora` changes is not called, so that nothing can be added to its
    output. Arguments: see `add_hot`.
    """
    for name in lora.layers:
        _check(module, name, module.get_submodule(name), atomic)


def not_hot(lora: LoRA) -> str:
    """Return why `lora` cannot be hot, a text that names the changes which are no product of two thin matrices; empty
    if it can.
    """
    if not lora.others:
        return ""
    kinds = sorted({change.kind for change in lora.others.values()})
    return (
        f"{lora.where} changes {shortened(lora.others, 4)} by {', '.join(kinds)}, which cannot be computed beside the "
        "weights"
    )


def clear_hot(module: nn.Module) -> int:
    """Remove all hot LoRAs (added to outputs, not to weights) from the layers of `module` and return the number of
    layers that had one, an int.
    """
    engine = managed(module)
    if engine is not None and is_hot(module):
        engine.leave()
    changed = [layer for layer in module.modules() if isinstance(layer, LoRAHotLoadMixin)]
    for layer in changed:
        del layer.lora_down, layer.lora_up
        _set_class(layer, type(layer).__mro__[2])
    forget_hot(module)
    _reset_compiled(module)
    return len(changed)


def is_hot(module: nn.Module) -> bool:
    """Whether any layer of `module` has a hot LoRA (added to its output, not to its weight)."""
    return any(isinstance(layer, LoRAHotLoadMixin) for layer in module.modules())


@functools.cache
def _with_lora(layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"LoRA{layer.__name__}", (LoRAHotLoadMixin, layer), {"__module__": layer.__module__})


def _set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.__class__ = kind
    forward_chain.class_changed(layer)


def _reset_compiled(module: nn.Module) -> None:
    # Graphs of torch 2.11 have no guard on the classes of the layers in them, and would run on without the LoRA.
    if any(map(forward_chain.is_compiled, module.modules())):
        torch.compiler.reset()


def _check(module: nn.Module, name: str, layer: nn.Module, atomic: tuple[type, ...]) -> None:
    parents = [module.get_submodule(name[:end]) for end, char in enumerate(name) if char == "."]
    # torch's attention module reads the weight of its output projection (NonDynamicallyQuantizableLinear) directly.
    inside = next((each for each in parents if isinstance(each, (nn.MultiheadAttention, *atomic))), None)
    if inside is not None:
        raise ValueError(
            f"{name} is inside a {type(inside).__name__}, which reads its weight without calling it, so a hot LoRA "
            "would do nothing. Use hotload=False"
        )
    if forward_chain.is_compiled(layer):
        raise ValueError(f"{name} is compiled by itself; load hot LoRAs before compile_pipeline()")
