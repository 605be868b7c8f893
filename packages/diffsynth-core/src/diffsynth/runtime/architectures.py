"""The facts that plugins declare about the class of a module, and the blocks that follow from them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffsynth import _discovery
from diffsynth.core.vram.partition import Partition, partition
from diffsynth.errors import did_you_mean
from diffsynth.spec import ArchitectureSpec, resolve

SHORTEST = 4
"""`cached_stacks` leaves out stacks that are shorter than the longest one by more than this factor."""


@dataclass(frozen=True)
class Stack:
    """The blocks of a list, which run in order, and the list's name in its network."""

    name: str
    blocks: tuple[nn.Module, ...]


def architecture_of(module: nn.Module) -> ArchitectureSpec | None:
    """Return the `ArchitectureSpec` declared for a module's class, or its nearest base class; None if there is none."""
    declared = {each.spec.module: each.spec for each in reversed(_discovery.catalog().architectures)}
    names = (f"{kind.__module__}:{kind.__qualname__}" for kind in type(module).__mro__)
    return next((declared[name] for name in names if name in declared), None)


def cuts(architecture: ArchitectureSpec | None) -> dict[str, Any]:
    """Return a dict with the keyword arguments `repeated`, `atomic` and `high_precision` of `diffsynth.core.vram.wrap`,
    from an architecture; for None only `atomic`.

    Layer classes that plugins declare atomic (`register_layer_wrappers`) are included, also without an architecture.
    """
    declared = [each.spec for each in _discovery.catalog().layer_wrappers]
    layers = [spec.layer for spec in declared if spec.atomic]
    # A class whose module is not imported has no instances, so it is not imported for this.
    atomic = [resolve(layer) for layer in layers if layer.partition(":")[0] in sys.modules]
    if architecture is None:
        return {"atomic": tuple(atomic)}
    return {
        "repeated": architecture.repeated_blocks,
        "atomic": (*atomic, *(resolve(layer) for layer in architecture.atomic)),
        "high_precision": architecture.high_precision,
    }


def partition_by(architecture: ArchitectureSpec | None, module: nn.Module) -> Partition:
    """Return the `Partition` of a module: the blocks that `wrap` would cut it into, and the parameters outside."""
    return partition(module, **{name: cut for name, cut in cuts(architecture).items() if name != "high_precision"})


def compiled_stacks(module: nn.Module) -> tuple[Stack, ...]:
    """Return a tuple with a `Stack` per list of blocks that a module's architecture declares for compiling one by one;
    empty if it declares none, or if the module has no architecture.

    Raises:
        ValueError: the module has no list of a declared name.
    """
    return _stacks(module, "compiled_blocks")


def cached_stacks(module: nn.Module) -> tuple[Stack, ...]:
    """Return a tuple with a `Stack` per list of blocks that a step cache may skip: those that a module's architecture
    declares and that have at least a quarter of the blocks of the longest one.

    The refiners of Z-Image, 2 blocks beside 30, are not among them.

    Raises:
        ValueError: the module has no list of a declared name.
    """
    stacks = _stacks(module, "cached_blocks")
    longest = max((len(stack.blocks) for stack in stacks), default=0)
    return tuple(stack for stack in stacks if SHORTEST * len(stack.blocks) >= longest > 0)


def _stacks(module: nn.Module, use: str) -> tuple[Stack, ...]:
    """Return a tuple of `Stack`s: the lists in the field `use` of the module's `ArchitectureSpec`, or, if it is None,
    those in `repeated_blocks`.
    """
    architecture = architecture_of(module)
    if architecture is None:
        return ()
    declared = getattr(architecture, use)
    names = architecture.repeated_blocks if declared is None else declared
    return tuple(Stack(name, _items(module, name, architecture)) for name in names)


def _items(module: nn.Module, name: str, architecture: ArchitectureSpec) -> tuple[nn.Module, ...]:
    try:
        return tuple(module.get_submodule(name).children())
    except AttributeError:
        known = [path for path, _ in module.named_modules()]
        raise ValueError(
            f"architecture {architecture.name} declares blocks {name!r}, which {type(module).__name__} does not have"
            f"{did_you_mean(name, known)}"
        ) from None
