"""LoRAs of one forward pass: added to the outputs of layers inside of a `with` block, in the thread that entered it.

Other threads that run the same module at that time run it without the LoRA, and nothing stays behind afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from diffsynth.core import forward_chain
from diffsynth.core.lora.changes import LoRALayer
from diffsynth.core.lora.format import LoRA
from diffsynth.core.lora.hot import check_layers, not_hot, with_change

_ENTERED: ContextVar[tuple[object, ...]] = ContextVar("lora scopes that this thread is in", default=())


def check_scoped(module: nn.Module, lora: LoRA, *, atomic: tuple[type, ...] = ()) -> None:
    """Raise ValueError if a LoRA that fits a module cannot be used by `scoped`.

    Args:
        module: the module.
        lora: a LoRA with the names of its layers, from `fit`.
        atomic: module classes that read the weights of their layers without calling the layers.

    Raises:
        ValueError: a layer whose forward is not called, a change that is no product of two thin matrices, or a module
            with compiled parts, whose code does not ask for the LoRA.
    """
    if reason := not_hot(lora):
        raise ValueError(f"{reason}. Use load_lora(), which fuses it into them")
    check_layers(module, lora, atomic=atomic)
    if any(map(forward_chain.is_compiled, module.modules())):
        raise ValueError(
            f"{lora.where} is for one call, and the {type(module).__name__} has compiled parts, which would run "
            "without it. Use load_lora(), or a pipeline that is not compiled"
        )


@contextmanager
def scoped(module: nn.Module, layers: Mapping[str, LoRALayer]) -> Iterator[None]:
    """Add LoRA layers to the outputs of a module's layers inside of the `with` block, in this thread alone.

    Args:
        module: the module; it may be wrapped by the VRAM engine under any policy.
        layers: name of a layer of the module -> its change, on the device that the layer computes on.
    """
    scope = object()
    entered = _ENTERED.set((*_ENTERED.get(), scope))
    handles = [
        module.get_submodule(name).register_forward_hook(partial(_add, scope, change.down, change.scaled_up()))
        for name, change in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _ENTERED.reset(entered)


def _add(scope: object, down: Tensor, up: Tensor, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Any:
    """Return a layer's output with a LoRA added; None, which leaves it as it is, in a thread that is not in `scope`."""
    if scope not in _ENTERED.get():
        return None
    return with_change(output, inputs[0], down, up)
