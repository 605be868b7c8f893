"""Layers around the `forward` of one module instance: the one place that installs, finds and removes them.

    install(block, ForwardLayer.STREAMING, functools.partial(functools.partial, run_with_weights))
    remove(block, ForwardLayer.STREAMING)

A layer is a decorator: it gets the forward beneath it and returns the callable that is called instead. Layers have a
fixed order, whichever is installed first, so removing one leaves the others in effect.

A forward that other code assigned to the instance (a hook of accelerate, `module.forward = torch.compile(...)`, a
function of the user) stays in effect. If it was there before, it is the innermost forward. If it was assigned later and
refers to the chain by `__wrapped__`, it stays outermost; otherwise the next `install` puts all layers around it.
"""

from __future__ import annotations

import enum
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Decorator = Callable[[Forward], Forward]

_CHAIN = "_diffsynth_forward_chain"
_UNCOMPILED = "_torchdynamo_orig_callable"
"""torch's attribute of a function that `torch.compile` returned: the function that was compiled."""

_lock = threading.RLock()


class ForwardLayer(enum.IntEnum):
    """The kinds of layers, from the outermost to the innermost."""

    STEP_CACHE = 0
    """Reuses the output of an earlier denoising step. Outside of streaming: a skipped block needs no weights."""
    STREAMING = 1
    """Moves the weights of the module to its device. Outside of compiled code, which must not trace it."""
    COMPILED = 2
    """The module's own forward, compiled."""


_COPIED = frozenset({ForwardLayer.COMPILED})
"""Layers that a copy of a module has, too; the others belong to the original alone."""


def install(module: nn.Module, layer: ForwardLayer, decorate: Decorator) -> None:
    """Install `decorate`, a decorator, around the forward of `module` as a layer of kind `layer`, in place of an
    earlier one of that kind.

    A deep copy of the module, or a pickled one, keeps a COMPILED layer only: the others belong to the original.

    Args:
        module: the instance; its class is not changed.
        layer: the kind of the layer, which decides its position.
        decorate: called with the forward beneath, and again whenever that changes; returns what is called instead.
    """
    with _lock:
        before, forward = _chain(module), vars(module).get("forward")
        decorators = {**(before.decorators() if before is not None else {}), layer: decorate}
        if before is not None and _leads_to(forward, before):
            before.set(decorators)
            return
        vars(module)["forward"] = vars(module)[_CHAIN] = _Chain(module, forward, decorators)
        if before is not None:
            # The assigned forward may call it, so it must not run its layers a second time.
            before.set({})


def remove(module: nn.Module, layer: ForwardLayer) -> None:
    """Remove the layer of kind `layer` from `module`, if there is one; other layers, and forwards that other code
    assigned, stay in effect.

    After the last layer the instance has the `forward` that it had before the first one, or none of its own.
    """
    with _lock:
        chain = _chain(module)
        if chain is None or layer not in chain.layers:
            return
        chain.set({kind: decorate for kind, decorate in chain.decorators().items() if kind is not layer})
        instance, assigned = vars(module), chain.assigned
        if not chain.layers and instance.get("forward") is chain:
            del instance["forward"], instance[_CHAIN]
            if assigned is not None:
                instance["forward"] = assigned


def find(module: nn.Module, layer: ForwardLayer) -> Forward | None:
    """Return the callable that the layer of kind `layer` has put around the forward of `module`; None if there is no
    such layer.
    """
    chain = _chain(module)
    found = None if chain is None else chain.layers.get(layer)
    return None if found is None else found.made


def class_changed(module: nn.Module) -> None:
    """Rebuild the layers of `module` around the forward of its new class; to be called after an assignment to
    `module.__class__`.
    """
    with _lock:
        if (chain := _chain(module)) is not None:
            chain.set(chain.decorators())


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of `module` itself run compiled code, by a layer, by `torch.compile` or by `module.compile()`; its
    submodules do not count.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return any(
        hasattr(forward, _UNCOMPILED) or (isinstance(forward, _Chain) and ForwardLayer.COMPILED in forward.layers)
        for forward in _unwrapped(vars(module).get("forward"))
    )


def uncompiled(forward: Forward) -> Forward:
    """Return the function that `torch.compile` compiled to `forward`, or `forward` itself if it is not compiled."""
    function: Forward = getattr(forward, _UNCOMPILED, forward)
    return function


@dataclass(frozen=True)
class _Layer:
    """A decorator, the forward that it got, and the callable that it returned."""

    decorate: Decorator
    beneath: Forward
    made: Forward


class _Chain:
    """The callable that an instance has as `forward` while it has layers.

    Its layers are replaced as a whole, so a call in another thread runs either the old ones or the new ones.

    Args:
        module: the instance.
        assigned: the forward that other code assigned to the instance, or None for that of its class.
        decorators: the layers to begin with.
    """

    def __init__(
        self, module: nn.Module, assigned: Forward | None, decorators: Mapping[ForwardLayer, Decorator]
    ) -> None:
        self.module = module
        self.assigned = assigned
        self.layers: dict[ForwardLayer, _Layer] = {}
        self._innermost = self._outermost = assigned or module.forward
        self.set(decorators)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._outermost(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        decorators = self.decorators()
        return _Chain, (self.module, self.assigned, {kind: decorators[kind] for kind in decorators if kind in _COPIED})

    @property
    def __wrapped__(self) -> Forward:
        """Innermost forward, which has the signature: `inspect` and hooks of other libraries ask for it."""
        return self._innermost

    def decorators(self) -> dict[ForwardLayer, Decorator]:
        """Return a new dict kind (`ForwardLayer`) -> decorator, with one entry for each layer."""
        return {kind: layer.decorate for kind, layer in self.layers.items()}

    def set(self, decorators: Mapping[ForwardLayer, Decorator]) -> None:
        """Replace all layers by those of `decorators` (kind -> decorator), built around the innermost forward in the
        order of their kinds.

        Calls run the earlier layers until the new ones are built.
        """
        innermost = self.assigned or types.MethodType(type(self.module).forward, self.module)
        innermost = self._innermost if self._innermost == innermost else innermost
        outermost, layers = innermost, {}
        for kind in sorted(decorators, reverse=True):
            layer, decorate = self.layers.get(kind), decorators[kind]
            # A layer whose inside is the same stays: compiled code is not compiled again for a change outside of it.
            if layer is None or layer.decorate is not decorate or layer.beneath is not outermost:
                layer = _Layer(decorate, outermost, decorate(outermost))
            layers[kind], outermost = layer, layer.made
        self._innermost, self._outermost, self.layers = innermost, outermost, layers


def _chain(module: nn.Module) -> _Chain | None:
    chain = vars(module).get(_CHAIN)
    # A shallow copy of a module has the chain of the original.
    return chain if isinstance(chain, _Chain) and chain.module is module else None


def _leads_to(forward: Forward | None, chain: _Chain) -> bool:
    return any(each is chain for each in _unwrapped(forward))


def _unwrapped(forward: Forward | None) -> list[Forward]:
    """Return a list of `forward`, the function that it wraps (its `__wrapped__`), and so on inward; empty for None."""
    found = []
    while forward is not None:
        found.append(forward)
        forward = getattr(forward, "__wrapped__", None)
    return found
